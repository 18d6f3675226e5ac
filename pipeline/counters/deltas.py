"""What a process has counted since its last merge with the others: kept as it came, summed outside the hot path."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.counters.neighbours import rank_in_run, summed_pairs

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, columns (0: the row's own popularity), weights: all [n]
MAX_PAIRS = 1 << 22  # 48 MiB, 25 s of 8 k events/s; beyond it they are summed at once
KEPT_PAIRS = 1 << 20  # and the lightest stay local: only while nothing can be merged


@dataclass(slots=True)
class Deltas:
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

    def of(self, tokens: np.ndarray) -> "Deltas":
        """Those of these items."""
        return self._part(np.isin(self.items, tokens), np.isin(self.rows, tokens))

    def without(self, tokens: np.ndarray) -> "Deltas":
        """Those that do not name any of these items."""
        return self._part(~np.isin(self.items, tokens), ~(np.isin(self.rows, tokens) | np.isin(self.columns, tokens)))

    def _part(self, own: np.ndarray, pair: np.ndarray) -> "Deltas":
        return Deltas(
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
    parts: list[Part]

    def summed(self, limit: int) -> Deltas:
        """Any thread may do this. At most the `limit` heaviest pairs of a row are kept."""
        rows, columns, weights = _sum(self.parts)
        weights = weights * np.float32(self.unit)
        own = columns == 0
        order = np.lexsort((-weights[~own], rows[~own]))
        pairs = [column[~own][order] for column in (rows, columns, weights)]
        kept = rank_in_run(pairs[0]) < limit
        pairs = [column[kept] for column in pairs]
        return Deltas(self.as_of_ms, rows[own], weights[own].astype(np.float64), *pairs)


@dataclass(slots=True)
class DeltaLog:
    """Collects counts as they come."""

    parts: list[Part] = field(default_factory=list)
    size: int = 0

    def add(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """Weights float32 [n] in the counters' units."""
        self.parts.append((rows, columns, weights))
        self.size += len(rows)
        if self.size > MAX_PAIRS:
            rows, columns, weights = _sum(self.parts)
            kept = np.argpartition(-weights, min(KEPT_PAIRS, len(rows) - 1))[:KEPT_PAIRS]
            self.parts, self.size = [(rows[kept], columns[kept], weights[kept])], len(kept)

    def take(self) -> list[Part]:
        taken, self.parts, self.size = self.parts, [], 0
        return taken

    def forget(self, gone: np.ndarray) -> None:
        """Drop what was counted of these items and of pairs with them. gone: bool, by token."""
        kept = [~(gone[rows] | gone[columns]) for rows, columns, _ in self.parts]
        self.parts = [(a[keep], b[keep], c[keep]) for (a, b, c), keep in zip(self.parts, kept, strict=True)]
        self.size = sum(len(rows) for rows, _, _ in self.parts)

    def scale(self, factor: float) -> None:
        self.parts = [(rows, columns, weights * np.float32(factor)) for rows, columns, weights in self.parts]


def _sum(parts: list[Part]) -> Part:
    parts = parts or [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
    return summed_pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))
