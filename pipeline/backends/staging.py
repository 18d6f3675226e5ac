"""Copies between the host and the device: one copy each way per batch, out of and into pinned memory.

To the device, two buffers alternate on a stream of their own, so one batch is copied while the device still processes
the previous one. To the host, the copy is queued behind the batch's work and waited for once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: columns begin at multiples


@dataclass(slots=True)
class StagingBuffer:
    """Pinned host memory and its counterpart on the device."""

    pinned: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    on_device: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # `pinned` may be written again
    read: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # `on_device` may be written again


class Staging:
    """Copies columns to `device`, from one thread. A result is valid until the next call but one has begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._buffers = [StagingBuffer(), StagingBuffer()]  # the next one first

    def __call__(self, *columns: np.ndarray) -> list[Tensor]:
        """Return the columns on the device with their dtypes and shapes; the current stream waits for the copy."""
        if self._device.type != "cuda":
            return [torch.from_numpy(column) for column in columns]
        current = torch.cuda.current_stream(self._device)
        buffer, previous = self._buffers
        self._buffers.reverse()
        previous.read.record(current)  # all work that reads the previous call's columns is queued by now
        sizes = [-(-column.nbytes // ALIGNMENT) * ALIGNMENT for column in columns]
        *starts, total = accumulate(sizes, initial=0)
        self._reserve(buffer, total)
        buffer.copied.synchronize()
        for column, start in zip(columns, starts, strict=True):
            buffer.pinned[start : start + column.nbytes].numpy().view(column.dtype)[:] = column.ravel()
        with torch.cuda.stream(self._stream):
            buffer.read.wait(self._stream)
            buffer.on_device[:total].copy_(buffer.pinned[:total], non_blocking=True)
            buffer.copied.record(self._stream)
        buffer.copied.wait(current)
        return [_view_as(buffer.on_device[start:], column) for column, start in zip(columns, starts, strict=True)]

    def groups(self, *groups: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Return several groups of columns on the device, by one copy."""
        tensors = iter(self(*chain.from_iterable(groups)))
        return [list(islice(tensors, len(group))) for group in groups]

    def _reserve(self, buffer: StagingBuffer, nbytes: int) -> None:
        if nbytes > len(buffer.on_device):
            # NOTE: these streams only, not the entire device: another thread may be capturing a graph.
            self._stream.synchronize()
            torch.cuda.current_stream(self._device).synchronize()
            size = 1 << max(16, (nbytes - 1).bit_length())
            buffer.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            buffer.on_device = torch.empty(size, dtype=torch.uint8, device=self._device)


class HostCopy:
    """Tensors of one device on their way to the host, in one copy behind the work that computes them.

    On a CPU they are there already, and nothing is copied.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """Queue the copy. Returns at once."""
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type != "cuda":
            return
        packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
        pinned = torch.empty(len(packed), dtype=torch.uint8, pin_memory=True)
        pinned.copy_(packed, non_blocking=True)
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        self._tensors = [
            part.view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(pinned.split(sizes), tensors, strict=True)
        ]
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> list[np.ndarray]:
        """Wait until the tensors are on the host and return them as arrays."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def _view_as(memory: Tensor, column: np.ndarray) -> Tensor:
    dtype = torch.from_numpy(column[:0]).dtype
    return memory[: column.nbytes].view(dtype).view(column.shape)
