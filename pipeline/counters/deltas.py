"""Counts of a process since its last merge with the others: logged as they come, summed outside the hot path."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.counters.neighbours import summed_pairs
from pipeline.jagged import rank_in_run

DeltaChunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns (0: the row's own popularity), weights: all [n]
MAX_PAIRS = 1 << 22  # 48 MiB, 25 s of 8 k events/s; a longer log is summed at once
KEPT_PAIRS = 1 << 20  # the heaviest pairs kept then; the others never leave this process. Only while merges fail


@dataclass(slots=True)
class CountDeltas:
    """Counts as of `as_of_ms`. Items ascend; pairs ascend by row and descend by weight within it; all are distinct."""

    as_of_ms: int
    items: np.ndarray  # int32 [items]
    popularity: np.ndarray  # float64 [items]
    rows: np.ndarray  # int32 [pairs]
    columns: np.ndarray  # int32 [pairs]
    weights: np.ndarray  # float32 [pairs]

    def touched(self) -> np.ndarray:
        """Return the items with anything to merge, ascending: int32."""
        return np.union1d(self.items, self.rows)

    def select(self, tokens: np.ndarray) -> "CountDeltas":
        """Return the counts of these items."""
        return self._masked(np.isin(self.items, tokens), np.isin(self.rows, tokens))

    def without(self, tokens: np.ndarray) -> "CountDeltas":
        """Return the counts that do not involve any of these items."""
        return self._masked(~np.isin(self.items, tokens), ~(np.isin(self.rows, tokens) | np.isin(self.columns, tokens)))

    def _masked(self, item_mask: np.ndarray, pair_mask: np.ndarray) -> "CountDeltas":
        return CountDeltas(
            self.as_of_ms,
            self.items[item_mask],
            self.popularity[item_mask],
            self.rows[pair_mask],
            self.columns[pair_mask],
            self.weights[pair_mask],
        )


@dataclass(slots=True)
class RawDeltas:
    """Logged chunks in the counters' units; times `unit` they are counts as of `as_of_ms`."""

    as_of_ms: int
    unit: float
    chunks: list[DeltaChunk]

    def summed(self, limit: int) -> CountDeltas:
        """Return the sums, with at most the `limit` heaviest pairs per row. Any thread may call it."""
        rows, columns, weights = _sum_chunks(self.chunks)
        weights = weights * np.float32(self.unit)
        own = columns == 0
        order = np.lexsort((-weights[~own], rows[~own]))
        pairs = [column[~own][order] for column in (rows, columns, weights)]
        is_heavy = rank_in_run(pairs[0]) < limit
        pairs = [column[is_heavy] for column in pairs]
        return CountDeltas(self.as_of_ms, rows[own], weights[own].astype(np.float64), *pairs)


@dataclass(slots=True)
class DeltaLog:
    """Collects counts in the order they come."""

    chunks: list[DeltaChunk] = field(default_factory=list)
    size: int = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Log counts; weights: float32 [n] in the counters' units."""
        self.chunks.append((rows, columns, weights))
        self.size += len(rows)
        if self.size > MAX_PAIRS:
            rows, columns, weights = _sum_chunks(self.chunks)
            heaviest = np.argpartition(-weights, min(KEPT_PAIRS, len(rows) - 1))[:KEPT_PAIRS]
            self.chunks = [(rows[heaviest], columns[heaviest], weights[heaviest])]
            self.size = len(heaviest)

    def take(self) -> list[DeltaChunk]:
        """Return the chunks and start an empty log."""
        chunks = self.chunks
        self.chunks = []
        self.size = 0
        return chunks

    def forget(self, evicted: np.ndarray) -> None:
        """Drop the counts of these items and of pairs with them. evicted: bool, by token."""
        masks = [~(evicted[rows] | evicted[columns]) for rows, columns, _ in self.chunks]
        self.chunks = [(a[mask], b[mask], c[mask]) for (a, b, c), mask in zip(self.chunks, masks, strict=True)]
        self.size = sum(len(rows) for rows, _, _ in self.chunks)

    def scale(self, factor: float) -> None:
        self.chunks = [(rows, columns, weights * np.float32(factor)) for rows, columns, weights in self.chunks]


def _sum_chunks(chunks: list[DeltaChunk]) -> DeltaChunk:
    chunks = chunks or [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
    return summed_pairs(*(np.concatenate(column) for column in zip(*chunks, strict=True)))
