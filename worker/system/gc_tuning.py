"""Keep Python's garbage collector from scanning what lives as long as the process.

A worker has a million objects from its imports, its model and its catalogue, and makes tens of thousands of short-lived
ones per second. With the default thresholds the collector starts every 700 allocations and scans survivors again and
again, with the interpreter locked.
"""

import gc
import time

from worker import metrics

# Allocations beyond deallocations before the youngest generation is scanned: more than a worker's pending events need,
# so that most objects are freed by their reference count before any scan.
YOUNG_OBJECTS = 50_000
YOUNG_SCANS = 20  # before the middle generation is scanned
MIDDLE_SCANS = 50  # before everything is scanned that is not frozen
_started_s = 0.0


def settle() -> None:
    """Free cyclic garbage, then leave all objects that are alive out of later scans. Takes tenths of a second.

    For the end of a start, and after a model was replaced: the replaced one's cycles are freed only here.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_SCANS, MIDDLE_SCANS)


def measure() -> None:
    """Export the length of every scan from now on."""
    if _observe not in gc.callbacks:
        gc.callbacks.append(_observe)


def _observe(phase: str, info: dict[str, int]) -> None:
    global _started_s
    if phase == "start":
        _started_s = time.perf_counter()
    else:
        metrics.GC_SECONDS.labels(info["generation"]).observe(time.perf_counter() - _started_s)
