"""What a process has counted since its last merge with the others: kept as it came, summed outside the hot path."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.counters.neighbours import summed_pairs
from pipeline.jagged import rank_in_run

DeltaChunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns (0: the row's own popularity), weights: all [n]
MAX_PAIRS = 1 << 22  # 48 MiB, 25 s of 8 k events/s; beyond it they are summed at once
KEPT_PAIRS = 1 << 20  # and the lightest stay local: only while nothing can be merged


@dataclass(slots=True)
class CountDeltas:
    """Counts as of `as_of_ms`. Items ascend, pairs ascend by row and fall by weight within it; all are distinct."""

    as_of_ms: int
    items: np.ndarray  # int32 [items]
    popularity: np.ndarray  # float64 [items]
    rows: np.ndarray  # int32 [pairs]
    columns: np.ndarray  # int32 [pairs]
    weights: np.ndarray  # float32 [pairs]

    def touched(self) -> np.ndarray:
        """int32: the items with anything to merge, ascending."""
        return np.union1d(self.items, self.rows)

    def select(self, tokens: np.ndarray) -> "CountDeltas":
        """Those of these items."""
        return self._part(np.isin(self.items, tokens), np.isin(self.rows, tokens))

    def without(self, tokens: np.ndarray) -> "CountDeltas":
        """Those that do not name any of these items."""
        return self._part(~np.isin(self.items, tokens), ~(np.isin(self.rows, tokens) | np.isin(self.columns, tokens)))

    def _part(self, own: np.ndarray, pair: np.ndarray) -> "CountDeltas":
        return CountDeltas(
            self.as_of_ms,
            self.items[own],
            self.popularity[own],
            self.rows[pair],
            self.columns[pair],
            self.weights[pair],
        )


@dataclass(slots=True)
class RawDeltas:
    """Parts in the counters' units; `unit` makes counts as of `as_of_ms` of them."""

    as_of_ms: int
    unit: float
    chunks: list[DeltaChunk]

    def summed(self, limit: int) -> CountDeltas:
        """Any thread may do this. At most the `limit` heaviest pairs of a row are kept."""
        rows, columns, weights = _sum(self.chunks)
        weights = weights * np.float32(self.unit)
        own = columns == 0
        order = np.lexsort((-weights[~own], rows[~own]))
        pairs = [column[~own][order] for column in (rows, columns, weights)]
        kept = rank_in_run(pairs[0]) < limit
        pairs = [column[kept] for column in pairs]
        return CountDeltas(self.as_of_ms, rows[own], weights[own].astype(np.float64), *pairs)


@dataclass(slots=True)
class DeltaLog:
    """Collects counts as they come."""

    chunks: list[DeltaChunk] = field(default_factory=list)
    size: int = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Weights float32 [n] in the counters' units."""
        self.chunks.append((rows, columns, weights))
        self.size += len(rows)
        if self.size > MAX_PAIRS:
            rows, columns, weights = _sum(self.chunks)
            kept = np.argpartition(-weights, min(KEPT_PAIRS, len(rows) - 1))[:KEPT_PAIRS]
            self.chunks, self.size = [(rows[kept], columns[kept], weights[kept])], len(kept)

    def take(self) -> list[DeltaChunk]:
        taken, self.chunks, self.size = self.chunks, [], 0
        return taken

    def forget(self, gone: np.ndarray) -> None:
        """Drop what was counted of these items and of pairs with them. gone: bool, by token."""
        kept = [~(gone[rows] | gone[columns]) for rows, columns, _ in self.chunks]
        self.chunks = [(a[keep], b[keep], c[keep]) for (a, b, c), keep in zip(self.chunks, kept, strict=True)]
        self.size = sum(len(rows) for rows, _, _ in self.chunks)

    def scale(self, factor: float) -> None:
        self.chunks = [(rows, columns, weights * np.float32(factor)) for rows, columns, weights in self.chunks]


def _sum(parts: list[DeltaChunk]) -> DeltaChunk:
    parts = parts or [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
    return summed_pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
