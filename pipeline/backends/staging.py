"""Copies between the host and the device: one copy each way per batch, out of and into pinned memory.

To the device, two buffers alternate on a stream of their own, so one batch is copied while the device still processes
the previous one. To the host, the copy is queued behind the batch's work and waited for once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, chain, islice

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: columns begin at multiples
DTYPES = {
    np.dtype(name): getattr(torch, name) for name in ("bool", "uint8", "int16", "int32", "int64", "float32", "float64")
}


@dataclass(slots=True)
class StagingBuffer:
    """Pinned host memory and its counterpart on the device, of which there is a view per dtype."""

    pinned: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    host: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))  # the same memory as `pinned`
    on_device: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    views: dict[np.dtype, Tensor] = field(default_factory=dict)  # of `on_device`
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # `pinned` may be written again
    read: torch.cuda.Event = field(default_factory=torch.cuda.Event)  # `on_device` may be written again

    def allocate(self, nbytes: int, device: torch.device) -> None:
        """Replace the memory by this much or more. No copy may be under way."""
        size = 1 << max(16, (nbytes - 1).bit_length())
        self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.host = self.pinned.numpy()
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        self.views = {dtype: self.on_device.view(torch_dtype) for dtype, torch_dtype in DTYPES.items()}

    def write(self, column: np.ndarray, start: int) -> None:
        """Write a column at a byte of the host's memory."""
        self.host[start : start + column.nbytes].view(column.dtype)[:] = column.ravel()

    def view(self, column: np.ndarray, start: int) -> Tensor:
        """Return the device's memory from a byte on with the shape and dtype of a column, [n] or [n, m]."""
        strides = (*column.shape[1:], 1)
        return self.views[column.dtype].as_strided(column.shape, strides, start // column.itemsize)


class Staging:
    """Copies columns to `device`, from one thread. A result is valid until the next call but one has begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream = _copy_stream(device)
            self._buffers = [StagingBuffer(), StagingBuffer()]  # the next one first

    @torch.inference_mode()
    def __call__(self, *columns: np.ndarray) -> list[Tensor]:
        """Return the columns, of DTYPES, on the device in their shapes; the current stream waits for the copy."""
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
            buffer.write(column, start)
        with torch.cuda.stream(self._stream):
            buffer.read.wait(self._stream)
            buffer.on_device[:total].copy_(buffer.pinned[:total], non_blocking=True)
            buffer.copied.record(self._stream)
        buffer.copied.wait(current)
        return [buffer.view(column, start) for column, start in zip(columns, starts, strict=True)]

    def groups(self, *groups: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Return several groups of columns on the device, by one copy."""
        tensors = iter(self(*chain.from_iterable(groups)))
        return [list(islice(tensors, len(group))) for group in groups]

    def _reserve(self, buffer: StagingBuffer, nbytes: int) -> None:
        if nbytes > len(buffer.on_device):
            # NOTE: these streams only, not the entire device: another thread may be capturing a graph.
            self._stream.synchronize()
            torch.cuda.current_stream(self._device).synchronize()
            buffer.allocate(nbytes, self._device)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies to a device.

    NOTE: torch hands out 32 streams in turn. A new one per model would, some swaps later, be the one on which another
    thread captures graphs.
    """
    return torch.cuda.Stream(device)


class HostCopy:
    """Tensors of one device on their way to the host, in one copy behind the work that computes them.

    On a CPU they are there already, and nothing is copied.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """Queue the copy of int32 and float32 tensors. Returns at once."""
        assert all(tensor.dtype in (torch.int32, torch.float32) for tensor in tensors), "they are packed as words"
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            packed = torch.cat([tensor.reshape(-1).view(torch.int32) for tensor in tensors])
            self._pinned = torch.empty(len(packed), dtype=torch.int32, pin_memory=True)
            self._pinned.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> list[np.ndarray]:
        """Wait until the tensors are on the host and return them as arrays."""
        if self._arrived is None:
            return [tensor.numpy() for tensor in self._tensors]
        self._arrived.synchronize()
        ends = list(accumulate(tensor.numel() for tensor in self._tensors))
        parts = np.split(self._pinned.numpy(), ends[:-1])
        dtypes = (np.float32 if tensor.is_floating_point() else np.int32 for tensor in self._tensors)
        columns = zip(parts, dtypes, self._tensors, strict=True)
        return [part.view(dtype).reshape(tensor.shape) for part, dtype, tensor in columns]
