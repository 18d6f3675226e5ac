"""A batch's way to the device: one copy out of pinned memory, on a stream of its own.

Two places take turns, so that a batch is copied while the device still works on the one before.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

ALIGNED = 256  # bytes: where a column begins


@dataclass(slots=True)
class StagingBuffer:
    """Pinned memory and the device's: `copied` when what was in the first is in the second, `read` when the second may
    be written again."""

    pinned: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    there: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    read: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class Staging:
    """Columns to `device`, from one thread; what a call returned is valid until the next call but one has begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._stream, self._places = torch.cuda.Stream(device), [StagingBuffer(), StagingBuffer()]

    def __call__(self, *columns: np.ndarray) -> list[Tensor]:
        """The same on the device, each of its own dtype and shape; work on the current stream comes after the copy."""
        if self._device.type != "cuda":
            return [torch.from_numpy(column) for column in columns]
        now, (place, before) = torch.cuda.current_stream(self._device), self._places
        self._places.reverse()
        before.read.record(now)  # whatever reads the last call's columns is on its way
        sizes = [-(-column.nbytes // ALIGNED) * ALIGNED for column in columns]
        starts = list(accumulate(sizes, initial=0))
        self._reserve(place, starts[-1])
        place.copied.synchronize()
        for column, start in zip(columns, starts, strict=False):
            place.pinned[start : start + column.nbytes].numpy().view(column.dtype)[:] = column.ravel()
        with torch.cuda.stream(self._stream):
            place.read.wait(self._stream)
            place.there[: starts[-1]].copy_(place.pinned[: starts[-1]], non_blocking=True)
            place.copied.record(self._stream)
        place.copied.wait(now)
        return [_seen_as(place.there[start:], column) for column, start in zip(columns, starts, strict=False)]

    def _reserve(self, place: StagingBuffer, nbytes: int) -> None:
        if nbytes > len(place.there):
            # Not the whole device: another thread may be capturing a graph.
            self._stream.synchronize()
            torch.cuda.current_stream(self._device).synchronize()
            size = 1 << max(16, (nbytes - 1).bit_length())
            place.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            place.there = torch.empty(size, dtype=torch.uint8, device=self._device)


def _seen_as(memory: Tensor, column: np.ndarray) -> Tensor:
    dtype = torch.from_numpy(column[:0]).dtype
    return memory[: column.nbytes].view(dtype).view(column.shape)
