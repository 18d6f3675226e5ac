"""Popularity and co-occurrence, decayed by event time: what the `simple` rung answers with, and the baseline to beat.

Two items co-occur when one user touches both within `window_events` events, at distance d with weight d^-1/4. A
candidate's score is the sum over the user's newest events of c(a, b) / (p(a)^0.5 p(b)^0.35), an event counting RECENCY
times its successor.

Decay is forward (Cormode et al., ICDE 2009): an event adds 2^((its time - reference) / half life), so nothing stored
is ever touched for the sake of time; the reference moves when the numbers grow large.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.counters.accumulator import RowTokenPairs, SparseAccumulator, row_top_k
from pipeline.counters.deltas import CountDeltas, DeltaLog, RawDeltas
from pipeline.counters.neighbours import NeighbourTable, pad_rows
from pipeline.counters.popularity import PopularityOrder, fill_rows
from pipeline.items.vocabulary import Vocabulary
from pipeline.jagged import ranges
from pipeline.records import DAY_MS, Histories, item_hash

# Tuned on MovieLens within its first 80 %: counted on the first 60 %, hit rate@10 over the next 20 %. Recency 0.8 to
# 0.85 and 10 to 20 recent events are within noise, recency 0.95 loses 1 point; flat distances lose 0.6.
RECENT_EVENTS = 10
RECENCIES = (0.85 ** np.arange(RECENT_EVENTS)).astype(np.float32)
DISTANCE_EXPONENT = 0.25
REBASE_HALF_LIVES = 60  # float32 ends at 2^127
CHUNK_USERS = 32  # temporaries below malloc's mmap threshold: 9 ms for 256 users, 11 ms in one piece
CHUNK_EVENTS = 4096


@dataclass(slots=True)
class ItemCounts:
    """Items' counts, each as of its own time."""

    tokens: np.ndarray  # int32 [n]
    popularity: np.ndarray  # float64 [n]
    as_of_ms: np.ndarray  # int64 [n]
    columns: np.ndarray  # int32 [n, slots] the neighbours' tokens, 0 = none
    weights: np.ndarray  # float32 [n, slots]


class Counters:
    """One thread observes and scores. `frozen`: observe changes nothing. `log`: set, it keeps what is counted.

    Items that the vocabulary bars are never among the answers; of one that it has retired nothing is kept.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        half_life_days: float,
        neighbours: int,
        window_events: int,
    ) -> None:
        self.vocabulary = vocabulary
        self.frozen = False
        self.log: DeltaLog | None = None
        self.newest_ms = 0  # the virtual clock: the newest event time seen
        self.popularity = np.zeros(1024)  # float64 [>= tokens], an event of the reference time weighs 1
        self.neighbours = NeighbourTable(neighbours)
        self._order, self._accumulator = PopularityOrder(), SparseAccumulator()
        self._version = vocabulary.version
        self._half_life_ms = half_life_days * DAY_MS
        self._distances = np.arange(1, window_events + 1)
        self._distance_weights = self._distances**-DISTANCE_EXPONENT
        self._reference_ms = 0

    def observe(self, histories: Histories, fresh: np.ndarray) -> None:
        """Count the newest `fresh[i]` events of each user i. fresh: int [n]."""
        fresh = np.minimum(fresh, histories.lengths)
        if self.frozen or not fresh.any():
            return
        self._sync()
        tokens = self.vocabulary.tokens(histories.items)
        new, _ = ranges(histories.offsets[1:] - fresh, fresh)  # [new] positions
        first = np.repeat(histories.offsets[:-1], fresh)  # [new] where the event's history begins
        ts_ms = histories.ts_ms[new]
        self._advance(int(ts_ms.max()))
        weights = np.exp2((ts_ms - self._reference_ms) / self._half_life_ms)  # float64 [new]
        for start in range(0, len(new), CHUNK_EVENTS):
            part = slice(start, start + CHUNK_EVENTS)
            self._count(tokens, new[part], first[part], weights[part])

    def top_k(self, histories: Histories, excluded: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best items of each user, best first; excluded items never appear; popular ones fill what is left.

        excluded: bool [total events], this event's item is kept off its user's row. Returns tokens int32 [n, k]
        (0 only where the catalogue is exhausted), scores float32 [n, k] (falling within a row),
        from_cooccurrence bool [n, k].
        """
        order = self._popularity_order()
        found = np.zeros((len(histories), k), np.int32)
        scores = np.zeros((len(histories), k), np.float32)
        cooccurring = np.zeros((len(histories), k), bool)
        step = min(CHUNK_USERS, self._accumulator.max_rows(len(order.ranks)))
        for start in range(0, len(histories), step):
            part = slice(start, start + step)
            offsets = histories.offsets[start : start + step + 1]
            tokens = self.vocabulary.tokens(histories.items[offsets[0] : offsets[-1]])
            banned = _excluded_pairs(tokens, offsets, excluded[offsets[0] : offsets[-1]])
            found[part], scores[part] = self._cooccurring(tokens, offsets - offsets[0], banned, order, k)
            cooccurring[part] = found[part] > 0
            fill_rows(order, banned, found[part], scores[part])
        return found, scores, cooccurring

    def score_items(self, histories: Histories, candidates: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c], in the order of `score`: co-occurring ones above 0, the others
        below, by popularity; -inf for token 0."""
        order = self._popularity_order()
        scores = np.where(candidates > 0, -1.0 - order.ranks[candidates], -np.inf).astype(np.float32)
        step = min(CHUNK_USERS, self._accumulator.max_rows(len(order.ranks)))
        for start in range(0, len(histories), step):
            part = slice(start, start + step)
            offsets = histories.offsets[start : start + step + 1]
            tokens = self.vocabulary.tokens(histories.items[offsets[0] : offsets[-1]])
            votes, weights = self._votes(tokens, offsets - offsets[0], order)
            sums = self._accumulator.sums_at(votes, weights, candidates[part], len(order.ranks))
            sums *= order.item_norms[candidates[part]]
            scores[part] = np.where(sums > 0, sums, scores[part])
        return scores

    def popular(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most popular items: tokens int32 [<= k], shares of the most popular one float32 [<= k]."""
        order = self._popularity_order()
        return order.tokens[:k].astype(np.int32), order.shares[:k]

    def rows(self, tokens: np.ndarray) -> ItemCounts:
        """These items' counts as of `newest_ms`."""
        self._sync()
        unit = self._unit()
        weights = self.neighbours.weights[tokens] * np.float32(unit)
        as_of_ms = np.full(len(tokens), self.newest_ms)
        return ItemCounts(tokens, self.popularity[tokens] * unit, as_of_ms, self.neighbours.tokens[tokens], weights)

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [n]: these items' decayed events, by an unknown unit: only to compare."""
        self._sync()
        return self.popularity[tokens]

    def counted(self) -> np.ndarray:
        """int32: every item that was ever counted."""
        self._sync()
        return np.flatnonzero(self.popularity[: len(self.vocabulary)]).astype(np.int32)

    def replace_rows(self, rows: ItemCounts) -> None:
        """Set items' counts to merged ones; what was counted here and is not yet taken by a merge is added again."""
        self._sync()
        self._advance(int(rows.as_of_ms.max(initial=0)))
        units = np.exp2((rows.as_of_ms - self._reference_ms) / self._half_life_ms)  # float64 [n]
        self.popularity[rows.tokens] = rows.popularity * units
        self.neighbours.tokens[rows.tokens] = rows.columns
        self.neighbours.weights[rows.tokens] = rows.weights * units[:, None]
        self._order.age += len(rows.tokens)
        if self.log is not None:
            self._count_again(rows.tokens, self.log)

    def take_deltas(self) -> RawDeltas:
        """What was counted since the last call; needs a `log`."""
        assert self.log is not None, "set Counters.log before it observes"
        self._sync()
        return RawDeltas(self.newest_ms, self._unit(), self.log.take())

    def put_back(self, deltas: CountDeltas) -> None:
        """Deltas that could not be merged go with the next merge."""
        assert self.log is not None, "deltas came from a log"
        unit = self._weight_at(deltas.as_of_ms)
        self.log.add(deltas.items, np.zeros_like(deltas.items), (deltas.popularity * unit).astype(np.float32))
        self.log.add(deltas.rows, deltas.columns, deltas.weights * np.float32(unit))

    def state(self) -> dict[str, np.ndarray]:
        """Everything as arrays that name items by hash, so that another vocabulary can restore it.

        items: uint64 [m]; popularity: float64 [m]; offsets: int64 [m + 1]; neighbours: int32 [pairs], an index into
        items; weights: float32 [pairs]; as_of_ms: int64 [1]. Counts are as of `as_of_ms`.
        """
        rows = self.rows(self.counted())
        index = np.zeros(len(self.popularity), np.int32)
        index[rows.tokens] = np.arange(len(rows.tokens))
        filled = (rows.weights > 0) & (self.popularity[rows.columns] > 0)  # its place in `items` names a neighbour
        return {
            "items": np.array([item_hash(self.vocabulary.item_ids[token]) for token in rows.tokens], np.uint64),
            "popularity": rows.popularity,
            "offsets": np.concatenate([[0], np.cumsum(filled.sum(axis=1))]),
            "neighbours": index[rows.columns[filled]],
            "weights": rows.weights[filled],
            "as_of_ms": np.array([self.newest_ms], np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a saved state; items that the vocabulary does not know are left out."""
        tokens = self.vocabulary.tokens(state["items"])
        slots = self.neighbours.tokens.shape[1]
        columns, weights = pad_rows(state["offsets"], tokens[state["neighbours"]], state["weights"], slots)
        known = tokens > 0
        as_of_ms = np.full(int(known.sum()), state["as_of_ms"][0])
        self.replace_rows(
            ItemCounts(tokens[known], state["popularity"][known], as_of_ms, columns[known], weights[known])
        )
        self._order = PopularityOrder()

    def _count_again(self, tokens: np.ndarray, log: DeltaLog) -> None:
        here = np.zeros(len(self.popularity), bool)
        here[tokens] = True
        for rows, columns, weights in log.chunks:
            own, pair = here[rows] & (columns == 0), here[rows] & (columns > 0)
            np.add.at(self.popularity, rows[own], weights[own])
            self.neighbours.add(rows[pair], columns[pair], weights[pair])

    def _count(self, tokens: np.ndarray, new: np.ndarray, first: np.ndarray, weights: np.ndarray) -> None:
        before = new[:, None] - self._distances  # [new, window] positions
        inside = before >= first[:, None]
        one = tokens[new]
        other = np.where(inside, tokens[np.maximum(before, 0)], 0)
        pair = (one[:, None] > 0) & (other > 0) & (other != one[:, None])
        one_of_pair = np.broadcast_to(one[:, None], pair.shape)[pair]
        weight_of_pair = (weights[:, None] * self._distance_weights)[pair].astype(np.float32)
        rows = np.concatenate([one_of_pair, other[pair]])
        columns = np.concatenate([other[pair], one_of_pair])
        both = np.concatenate([weight_of_pair, weight_of_pair])
        known = one > 0
        np.add.at(self.popularity, one[known], weights[known])
        self.neighbours.add(rows, columns, both)
        self._order.age += int(known.sum())
        if self.log is not None:
            self.log.add(one[known], np.zeros(int(known.sum()), np.int32), weights[known].astype(np.float32))
            self.log.add(rows, columns, both)

    def _cooccurring(
        self, tokens: np.ndarray, offsets: np.ndarray, banned: RowTokenPairs, order: PopularityOrder, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items by co-occurrence alone: tokens int32 [n, k], scores float32 [n, k], 0 where none."""
        votes, weights = self._votes(tokens, offsets, order)
        sums = self._accumulator.sums(votes, weights, banned, len(order.ranks))
        return row_top_k(votes, sums * order.item_norms.take(votes), k)

    def _votes(self, tokens: np.ndarray, offsets: np.ndarray, order: PopularityOrder) -> tuple[np.ndarray, np.ndarray]:
        """The neighbours of each user's newest events, int32 and float32 [n, RECENT_EVENTS * slots]."""
        positions = offsets[1:, None] - np.arange(1, RECENT_EVENTS + 1)  # [n, RECENT_EVENTS], newest first
        inside = positions >= offsets[:-1, None]
        recent = np.where(inside, np.append(tokens, 0)[np.maximum(positions, 0)], 0)
        coefficients = order.event_norms[recent] * RECENCIES  # [n, RECENT_EVENTS]
        votes = self.neighbours.tokens[recent].reshape(len(recent), -1)  # [n, RECENT_EVENTS * slots]
        return votes, (self.neighbours.weights[recent] * coefficients[:, :, None]).reshape(votes.shape)

    def _weight_at(self, ts_ms: int) -> float:
        """What one event of that time weighs in the stored units."""
        return 2.0 ** ((ts_ms - self._reference_ms) / self._half_life_ms)

    def _unit(self) -> float:
        """Counts as of now per stored unit."""
        return 1.0 / self._weight_at(self.newest_ms)

    def _advance(self, ts_ms: int) -> None:
        self.newest_ms = max(self.newest_ms, ts_ms)
        behind = (self.newest_ms - self._reference_ms) / self._half_life_ms
        if behind > REBASE_HALF_LIVES:
            factor = 2.0**-behind
            self.popularity *= factor
            self.neighbours.scale(factor)
            if self.log is not None:
                self.log.scale(factor)
            self._reference_ms = self.newest_ms

    def _popularity_order(self) -> PopularityOrder:
        self._sync()
        items = len(self.vocabulary)
        return self._order.updated(self.popularity[:items], self.vocabulary.blocked[:items])

    def _sync(self) -> None:
        """Have a row for every token, and none of what was counted of items that are retired."""
        self._reserve()
        if self._version == self.vocabulary.version:
            return
        retired, self._version = self.vocabulary.evicted_since(self._version), self.vocabulary.version
        self._order = PopularityOrder()
        if not retired.size:
            return
        gone = np.zeros(len(self.neighbours.tokens), bool)
        gone[retired] = True
        self.popularity[retired] = 0
        self.neighbours.forget(gone)
        if self.log is not None:
            self.log.forget(gone)

    def _reserve(self) -> None:
        rows = len(self.vocabulary)
        self.neighbours.reserve(rows)
        if rows > len(self.popularity):
            grown = np.zeros(max(rows, 2 * len(self.popularity)))
            grown[: len(self.popularity)] = self.popularity
            self.popularity = grown


def without_neighbours(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A saved state that fills every row by popularity alone."""
    alone = {name: array[:0] if name in ("neighbours", "weights") else array for name, array in state.items()}
    return alone | {"offsets": np.zeros_like(state["offsets"])}


def _excluded_pairs(tokens: np.ndarray, offsets: np.ndarray, excluded: np.ndarray) -> RowTokenPairs:
    """(row, token) of every excluded event whose item is known."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    barred = excluded & (tokens > 0)
    return users[barred], tokens[barred]
