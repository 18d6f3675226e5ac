"""In processes of their own: the allocator's settings are the whole process's."""

import subprocess
import sys

import pytest

HELD_AFTER_LARGE_BLOCKS = """
import sys, threading
from pathlib import Path
import numpy as np
from worker.malloc_tuning import trim_large_blocks

def resident_mib():
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmRSS")).split()[1]) / 1024

def fill_and_free(mib):
    for size in (mib, mib // 2):  # the first free teaches the allocator that such blocks come again
        blocks = [np.ones(size << 17), np.ones(size << 17), np.ones(1000)]  # a small one last: nothing can be trimmed
        kept.append(blocks.pop())
        del blocks

if sys.argv[1] == "returned":
    trim_large_blocks()
kept, before = [], resident_mib()
thread = threading.Thread(target=fill_and_free, args=(24,))
thread.start()
thread.join()
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_blocks_leave_the_process_when_they_are_freed() -> None:
    held_mib = {
        how: float(subprocess.check_output([sys.executable, "-c", HELD_AFTER_LARGE_BLOCKS, how]))
        for how in ("kept", "returned")
    }
    assert held_mib["returned"] < 8 < held_mib["kept"], held_mib
