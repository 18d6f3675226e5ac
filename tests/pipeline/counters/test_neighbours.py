"""The neighbour table touches only the memory of rows that have neighbours."""

from pathlib import Path

import numpy as np

from pipeline.counters.neighbours import NeighbourTable

ROWS = 200_000
SLOTS = 64


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256


def test_decay_leaves_empty_rows_without_memory() -> None:
    table = NeighbourTable(SLOTS, ROWS)
    before_mib = resident_mib()
    table.reserve(ROWS)
    table.add(np.array([5, 150_000]), np.array([7, 8]), np.array([1.0, 4.0], np.float32))
    table.scale(0.5)
    assert resident_mib() - before_mib < 16  # the weights of all rows: 49 MiB
    assert table.weights[[5, 150_000]].max(axis=1).tolist() == [0.5, 2.0]


def test_evicted_items_leave_all_rows() -> None:
    table = NeighbourTable(2, ROWS)
    table.reserve(10)
    table.add(np.array([1, 2, 2, 3]), np.array([2, 1, 3, 2]), np.ones(4, np.float32))
    evicted = np.zeros(10, bool)
    evicted[1] = True
    table.forget(evicted)
    assert {row: set(table.tokens[row].tolist()) - {0} for row in (1, 2, 3)} == {1: set(), 2: {3}, 3: {2}}
    assert (table.weights > 0).sum() == 2
