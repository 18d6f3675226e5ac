"""A bounded table of weighted neighbours: for every item the other items that its users touched around it.

A row has a fixed number of slots. Keeping the heaviest pairs only would lock newcomers out of a full row, since each
arrives with a small weight; so a newcomer always takes the lightest slot, and stays if it comes again before the next.
On the MovieLens log 64 slots of 242 pairs that occur cost 0.4 points of hit rate@10; Space Saving, where the newcomer
inherits the slot's weight, costs 11: rows are flat there, and the inherited weights drown them.
"""

import numpy as np

from pipeline.jagged import rank_in_run, run_starts

# 8 k pairs gather 2 MiB of slots: 1.6 M pairs take 1.0 s, in one piece 2.3 s (python -m timeit, one core of an EPYC).
CHUNK_PAIRS = 8192


class NeighbourTable:
    """tokens: int32 [rows, slots], 0 = empty; weights: float32 [rows, slots]. Row 0 stays empty: the unknown item."""

    __slots__ = ("tokens", "weights")

    def __init__(self, slots: int, rows: int = 1024) -> None:
        self.tokens = np.zeros((rows, slots), np.int32)
        self.weights = np.zeros((rows, slots), np.float32)

    def reserve(self, rows: int) -> None:
        """Have at least so many rows; untouched ones cost no memory until they are written."""
        if rows > len(self.tokens):
            size = max(rows, 2 * len(self.tokens))
            self.tokens, self.weights = _grown(self.tokens, size), _grown(self.weights, size)

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Count pairs [n]; a pair may come several times."""
        for start in range(0, len(rows), CHUNK_PAIRS):
            part = slice(start, start + CHUNK_PAIRS)
            self._add(*summed_pairs(rows[part], columns[part], weights[part]))

    def scale(self, factor: float) -> None:
        self.weights *= np.float32(factor)

    def forget(self, evicted: np.ndarray) -> None:
        """Empty these items' rows and their slots in all others. gone: bool [rows]"""
        self.tokens[evicted], self.weights[evicted] = 0, 0
        for start in range(0, len(evicted), CHUNK_PAIRS):
            rows, slots = np.nonzero(evicted[self.tokens[start : start + CHUNK_PAIRS]])
            self.tokens[start + rows, slots], self.weights[start + rows, slots] = 0, 0

    def _add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Distinct pairs, sorted by row."""
        matches = self.tokens[rows] == columns[:, None]  # [pairs, slots]
        slots = matches.argmax(axis=1)
        found = matches[np.arange(len(rows)), slots]
        self.weights[rows[found], slots[found]] += weights[found]
        rows, columns, weights = rows[~found], columns[~found], weights[~found]
        turns = rank_in_run(rows)
        for turn in range(min(int(turns.max(initial=-1)) + 1, self.tokens.shape[1])):
            now = turns == turn
            self._admit(rows[now], columns[now], weights[now])

    def _admit(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """One newcomer a row."""
        slots = self.weights[rows].argmin(axis=1)
        self.tokens[rows, slots], self.weights[rows, slots] = columns, weights


def summed_pairs(
    rows: np.ndarray, columns: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (row, column) in order with the sums of their weights: int32 [m], int32 [m], float32 [m]."""
    keys = rows.astype(np.int64) << 32 | columns
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = run_starts(keys)
    sums = np.add.reduceat(weights[order], starts) if len(keys) else weights
    keys = keys[starts]
    return (keys >> 32).astype(np.int32), keys.astype(np.int32), sums.astype(np.float32)


def _grown(array: np.ndarray, rows: int) -> np.ndarray:
    grown = np.zeros((rows, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown


def pad_rows(
    offsets: np.ndarray, columns: np.ndarray, weights: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Jagged rows as a table's: columns int32 [n, slots], weights float32 [n, slots]; of a longer row the heaviest.

    offsets: int64 [n + 1] into columns and weights; column 0 (unknown) is left out.
    """
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[columns > 0]
    columns, weights = columns[columns > 0], weights[columns > 0]
    order = np.lexsort((-weights, rows))
    rows, places = rows[order], rank_in_run(rows[order])
    kept = places < slots
    tokens, counts = np.zeros((len(offsets) - 1, slots), np.int32), np.zeros((len(offsets) - 1, slots), np.float32)
    tokens[rows[kept], places[kept]] = columns[order][kept]
    counts[rows[kept], places[kept]] = weights[order][kept]
    return tokens, counts
