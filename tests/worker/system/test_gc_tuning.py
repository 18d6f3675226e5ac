"""What lives long is left out of scans, replaced models are not, and every scan is measured."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

from worker.system import gc_tuning


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    gc.callbacks[:] = [each for each in gc.callbacks if each is not gc_tuning._observe]


class Node:
    """An object that refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_alive_is_not_scanned_again():
    gc_tuning.settle()
    assert gc.get_freeze_count() > 10_000
    assert sum(gc.get_count()) < 1000
    assert gc.get_threshold()[0] == gc_tuning.YOUNG_OBJECTS


def test_cycle_that_was_alive_at_one_call_is_freed_by_the_next():
    node = Node()
    reference = weakref.ref(node)
    gc_tuning.settle()
    del node
    gc.collect()
    assert reference() is not None  # frozen: no ordinary scan looks at it
    gc_tuning.settle()
    assert reference() is None


def test_every_scan_is_measured():
    name, labels = "millrace_gc_seconds_count", {"generation": "2"}
    before = REGISTRY.get_sample_value(name, labels) or 0.0
    gc_tuning.measure()
    gc_tuning.measure()  # a second call changes nothing
    gc.collect()
    assert REGISTRY.get_sample_value(name, labels) == before + 1
