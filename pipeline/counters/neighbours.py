"""A bounded table of weighted neighbours: per item, the other items its users interacted with around the same time.

A row has a fixed number of slots. Keeping only the heaviest pairs would lock newcomers out of a full row, since each
arrives with a small weight; so a newcomer always takes the lightest slot, and stays if it recurs before the next one.
On the MovieLens log 64 slots, of 242 pairs that occur per item, cost 0.4 points of hit rate@10; Space Saving, where the
newcomer inherits the slot's weight, costs 11: rows are flat there, and the inherited weights dominate them.
"""

import numpy as np

from pipeline.arrays import grown
from pipeline.jagged import rank_in_run, run_starts

# 8 k pairs gather 2 MiB of slots: 1.6 M pairs take 1.0 s, all at once 2.3 s (python -m timeit, one core of an EPYC).
CHUNK_PAIRS = 8192


class NeighbourTable:
    """Neighbours and their weights; row 0, the unknown item's, stays empty.

    tokens: int32 [>= rows, slots], 0 = empty; weights: float32 [>= rows, slots]
    """

    __slots__ = ("_max_rows", "_rows", "tokens", "weights")

    def __init__(self, slots: int, max_rows: int) -> None:
        """max_rows: the most rows that `reserve` will be called with"""
        self.tokens = np.zeros((1, slots), np.int32)
        self.weights = np.zeros((1, slots), np.float32)
        self._rows = 1
        self._max_rows = max_rows

    def reserve(self, rows: int) -> None:
        """Grow to at least this many rows; they take no memory until they are written."""
        self._rows = max(self._rows, rows)
        self.tokens = grown(self.tokens, rows, self._max_rows)
        self.weights = grown(self.weights, rows, self._max_rows)

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Count pairs [n]; a pair may occur several times."""
        for start in range(0, len(rows), CHUNK_PAIRS):
            part = slice(start, start + CHUNK_PAIRS)
            self._add(*summed_pairs(rows[part], columns[part], weights[part]))

    def scale(self, factor: float) -> None:
        """Multiply all weights."""
        for start in range(0, self._rows, CHUNK_PAIRS):
            weights = self.weights[start : min(start + CHUNK_PAIRS, self._rows)]
            if weights.any():  # an empty row's memory is not touched
                weights *= np.float32(factor)

    def forget(self, evicted: np.ndarray) -> None:
        """Clear these items' rows and their slots in all others. evicted: bool [rows]."""
        cleared = np.flatnonzero(evicted)
        self.tokens[cleared] = 0
        self.weights[cleared] = 0
        for start in range(0, len(evicted), CHUNK_PAIRS):
            rows, slots = np.nonzero(evicted[self.tokens[start : min(start + CHUNK_PAIRS, len(evicted))]])
            self.tokens[start + rows, slots] = 0
            self.weights[start + rows, slots] = 0

    def _add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Add distinct pairs, sorted by row."""
        matches = self.tokens[rows] == columns[:, None]  # [pairs, slots]
        slots = matches.argmax(axis=1)
        found = matches[np.arange(len(rows)), slots]
        self.weights[rows[found], slots[found]] += weights[found]
        self._insert(rows[~found], columns[~found], weights[~found])

    def _insert(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Give new pairs the lightest slots of their rows, one per row at a time."""
        ranks = rank_in_run(rows)
        for rank in range(min(int(ranks.max(initial=-1)) + 1, self.tokens.shape[1])):
            now = ranks == rank
            rows_now = rows[now]
            slots = self.weights[rows_now].argmin(axis=1)
            self.tokens[rows_now, slots] = columns[now]
            self.weights[rows_now, slots] = weights[now]


def summed_pairs(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct pairs in order and the sums of their weights: int32 [m], int32 [m], float32 [m]."""
    keys = rows.astype(np.int64) << 32 | columns
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = run_starts(keys)
    sums = np.add.reduceat(weights[order], starts) if len(keys) else weights
    keys = keys[starts]
    return (keys >> 32).astype(np.int32), keys.astype(np.int32), sums.astype(np.float32)


def pad_rows(
    offsets: np.ndarray, columns: np.ndarray, weights: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return jagged rows padded as a table's: columns int32 [n, slots], weights float32 [n, slots].

    offsets: int64 [n + 1] into columns and weights. Column 0 (unknown) is left out; the heaviest fill a row.
    """
    filled = columns > 0
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[filled]
    columns = columns[filled]
    weights = weights[filled]
    order = np.lexsort((-weights, rows))
    rows = rows[order]
    ranks = rank_in_run(rows)
    fits = ranks < slots
    cells = rows[fits], ranks[fits]
    padded_columns = np.zeros((len(offsets) - 1, slots), np.int32)
    padded_weights = np.zeros((len(offsets) - 1, slots), np.float32)
    padded_columns[cells] = columns[order][fits]
    padded_weights[cells] = weights[order][fits]
    return padded_columns, padded_weights
