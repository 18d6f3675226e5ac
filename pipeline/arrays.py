"""Arrays that grow."""

import math
import mmap

import numpy as np


def grown(array: np.ndarray, size: int, reserve: int = 0) -> np.ndarray:
    """Return the array, or where it is smaller than `size` a copy of at least double its length, zeros at its end.

    reserve: the copy has room for at least this many rows, so that it need not be copied again before it has them. They
    take address space, but no memory before they are written; where there is too little of it, nothing is reserved.
    """
    if size <= len(array):
        return array
    rows = max(size, 2 * len(array))
    larger = _reserved((reserve, *array.shape[1:]), array.dtype) if reserve > rows else None
    if larger is None:
        larger = np.zeros((rows, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger


def _reserved(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """Return zeros whose memory the kernel gives by pages of 4 KiB when they are first written; None: it refuses.

    numpy's own zeros are given by 2 MiB, a pause of 0.3 to 4 ms each (the kernel clears them, a host may have to find
    them first), and a small catalogue would take 2 MiB per array. Random reads are 30 % slower from small pages.
    """
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)
