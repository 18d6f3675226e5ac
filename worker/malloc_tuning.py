"""glibc's allocator, told to give large blocks back to the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# By default the first large block that is freed raises the threshold up to 32 MiB, and later ones stay in their
# thread's heap. The counters' deltas (blocks of 8 and 16 MiB every 15 s) so held 50 to 100 MiB more after a million
# events than after a tenth of them; with a fixed threshold of 1, 4, 8 MiB it was 0, 10, 30 MiB, at no more CPU time.
LARGE_BYTES = 4 << 20


def trim_large_blocks() -> None:
    """From here on a freed block of LARGE_BYTES leaves the process. Nothing happens where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
