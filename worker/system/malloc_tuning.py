"""Make glibc's allocator return large freed blocks to the system."""

import ctypes

# Constants of malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# By default freeing a large block raises the mmap threshold, up to 32 MiB; later blocks then stay in their thread's
# heap. So the counters' deltas (blocks of 8 and 16 MiB every 15 s) held 50 to 100 MiB more after a million events than
# after a tenth of them; with a fixed threshold of 1, 4, 8 MiB it was 0, 10, 30 MiB, at no more CPU time.
LARGE_BYTES = 4 << 20


def trim_large_blocks() -> None:
    """Let every freed block of LARGE_BYTES or more leave the process from now on. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
