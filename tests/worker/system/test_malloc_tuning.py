"""Memory of processes that free large blocks. Each runs by itself, because the allocator's settings are per process."""

import subprocess
import sys

import pytest

PRINT_HELD_MIB = """
import sys, threading
from pathlib import Path
import numpy as np
from worker.system.malloc_tuning import trim_large_blocks

def resident_mib():
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmRSS")).split()[1]) / 1024

def fill_and_free(mib):
    for size in (mib, mib // 2):  # the first free raises the allocator's threshold
        blocks = [np.ones(size << 17), np.ones(size << 17), np.ones(1000)]  # a small one last: nothing can be trimmed
        small.append(blocks.pop())
        del blocks

if sys.argv[1] == "tuned":
    trim_large_blocks()
small = []
before = resident_mib()
thread = threading.Thread(target=fill_and_free, args=(24,))
thread.start()
thread.join()
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_large_blocks_are_returned_to_the_system() -> None:
    held_mib = {
        malloc: float(subprocess.check_output([sys.executable, "-c", PRINT_HELD_MIB, malloc]))
        for malloc in ("default", "tuned")
    }
    assert held_mib["tuned"] < 8 < held_mib["default"], held_mib
