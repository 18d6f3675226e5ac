"""Popularity and co-occurrence counts, decayed by event time: the `simple` strategy and the baseline to beat.

Two items co-occur when one user interacts with both within `window_events` events; at distance d the weight is d^-1/4.

Decay is forward (Cormode et al., ICDE 2009): an event adds 2^((its time - reference) / half life), so stored counts are
never updated for the passing of time; the reference moves when the numbers grow large.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.arrays import grown
from pipeline.counters.deltas import CountDeltas, DeltaLog, RawDeltas
from pipeline.counters.neighbours import NeighbourTable, pad_rows
from pipeline.counters.pairs import follows_new, new_pairs
from pipeline.counters.popularity import PopularityOrder
from pipeline.counters.scoring import CooccurrenceScorer
from pipeline.event_clock import EventClock
from pipeline.items.vocabulary import Vocabulary
from pipeline.jagged import row_starts
from pipeline.records import DAY_MS, Histories

DISTANCE_EXPONENT = 0.25  # tuned as the constants of scoring.py: equal weights lose 0.6 points of hit rate@10
REBASE_HALF_LIVES = 60  # float32 ends at 2^127
# Sparse logs have such pauses. An event so far ahead counts as a thousand at the clock, and takes no precision from the
# counts before it: float32 has room for a hundred half-lives more.
MAX_LEAD_HALF_LIVES = 10
RESTORE_ITEMS = 1 << 14  # at a time: padded rows of all items would take twice the table
CHUNK_EVENTS = 4096


@dataclass(slots=True)
class ItemCounts:
    """Counts of items, each as of its own time."""

    tokens: np.ndarray  # int32 [n]
    popularity: np.ndarray  # float64 [n]
    as_of_ms: np.ndarray  # int64 [n]
    columns: np.ndarray  # int32 [n, slots], the neighbours' tokens, 0 = none
    weights: np.ndarray  # float32 [n, slots]


class Counters:
    """Counts events and ranks items. Used by one thread.

    frozen: `observe` changes nothing; log: when set, it records everything counted, for merging.
    Items that the vocabulary blocks are never returned; the counts of evicted items are dropped.
    """

    def __init__(self, vocabulary: Vocabulary, half_life_days: float, neighbours: int, window_events: int) -> None:
        self.vocabulary = vocabulary
        self.frozen = False
        self.log: DeltaLog | None = None
        self.popularity = np.zeros(1)  # float64 [>= tokens], an event at the reference time weighs 1
        self.neighbours = NeighbourTable(neighbours, vocabulary.max_tokens)
        self._scorer = CooccurrenceScorer(vocabulary, self.neighbours)
        self._order = PopularityOrder(vocabulary.max_tokens)
        self._version = vocabulary.version
        self._followed = vocabulary.changes.end
        self._half_life_ms = half_life_days * DAY_MS
        self._distance_weights = np.arange(1, window_events + 1) ** -DISTANCE_EXPONENT
        self._reference_ms = 0
        self._clock = EventClock(MAX_LEAD_HALF_LIVES * self._half_life_ms)

    @property
    def newest_ms(self) -> int:
        """The virtual clock: the latest event time that is believed."""
        return self._clock.newest_ms

    def observe(self, histories: Histories, is_new: np.ndarray) -> None:
        """Count these events, bool [total], and their pairs with each other and with their users' other events.

        An event of a time that the clock does not believe counts as one at the clock's time.
        """
        if self.frozen or not is_new.any():
            return
        self._sync()
        tokens = self.vocabulary.tokens(histories.items)
        all_ts_ms = histories.ts_ms
        self._advance(all_ts_ms[is_new])
        starts = row_starts(histories.offsets)  # [total] start of each event's history
        affected = np.flatnonzero(follows_new(is_new, starts, len(self._distance_weights)))
        ts_ms = np.minimum(all_ts_ms[affected], self.newest_ms)
        weights = np.exp2((ts_ms - self._reference_ms) / self._half_life_ms)  # float64 [affected]
        for start in range(0, len(affected), CHUNK_EVENTS):
            part = slice(start, start + CHUNK_EVENTS)
            self._count(tokens, is_new, affected[part], starts[affected[part]], weights[part])

    def top_k(self, histories: Histories, excluded: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k best items of each user, best first; popular items fill rows that co-occurrence leaves short.

        excluded: bool [total events], marks events whose items must not be in their user's row. Returns tokens int32
        [n, k] (0 only when the catalogue is exhausted), scores float32 [n, k] (descending within a row),
        from_cooccurrence bool [n, k].
        """
        return self._scorer.top_k(histories, excluded, k, self._popularity_order())

    def score_items(self, histories: Histories, candidates: np.ndarray) -> np.ndarray:
        """Return scores of given items (int32 [n, c]) in the order of `top_k`: float32 [n, c].

        Above 0 for items that co-occur; the others are below 0, by popularity; -inf for token 0.
        """
        return self._scorer.score_items(histories, candidates, self._popularity_order())

    def popular(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k most popular items: int32 [<= k], and their popularity relative to the first: float32 [<= k]."""
        tokens, relative = self._popularity_order().top(k)
        return tokens.astype(np.int32), relative

    def rows(self, tokens: np.ndarray) -> ItemCounts:
        """Return these items' counts as of `newest_ms`."""
        self._sync()
        unit = self._unit()
        weights = self.neighbours.weights[tokens] * np.float32(unit)
        as_of_ms = np.full(len(tokens), self.newest_ms)
        return ItemCounts(tokens, self.popularity[tokens] * unit, as_of_ms, self.neighbours.tokens[tokens], weights)

    def counts(self, tokens: np.ndarray) -> np.ndarray:
        """Return these items' decayed event counts in an arbitrary unit, only for comparison: float64 [n]."""
        self._sync()
        return self.popularity[tokens]

    def counted(self) -> np.ndarray:
        """Return every item with a count: int32."""
        self._sync()
        return np.flatnonzero(self.popularity[: len(self.vocabulary)]).astype(np.int32)

    def replace_rows(self, rows: ItemCounts) -> None:
        """Replace items' counts by merged ones, and add again what `log` holds: it is not yet part of any merge."""
        self._sync()
        self._advance(rows.as_of_ms)
        as_of_ms = np.minimum(rows.as_of_ms, self.newest_ms)
        units = np.exp2((as_of_ms - self._reference_ms) / self._half_life_ms)  # float64 [n]
        self.popularity[rows.tokens] = rows.popularity * units
        is_written = (rows.columns > 0).any(axis=1)
        is_written |= (self.neighbours.tokens[rows.tokens] > 0).any(axis=1)
        written = rows.tokens[is_written]  # an empty row's memory is not touched
        self.neighbours.tokens[written] = rows.columns[is_written]
        self.neighbours.weights[written] = (rows.weights * units[:, None])[is_written]
        self._order.age += len(rows.tokens)
        if self.log is not None:
            self._add_logged(rows.tokens, self.log)

    def take_deltas(self) -> RawDeltas:
        """Return the counts since the last call; needs a `log`."""
        assert self.log is not None, "set Counters.log before it observes"
        self._sync()
        return RawDeltas(self.newest_ms, self._unit(), self.log.take())

    def put_back(self, deltas: CountDeltas) -> None:
        """Return deltas that could not be merged to the log, for the next merge."""
        assert self.log is not None, "deltas came from a log"
        unit = self._weight_at(deltas.as_of_ms)
        self.log.add(deltas.items, np.zeros_like(deltas.items), (deltas.popularity * unit).astype(np.float32))
        self.log.add(deltas.rows, deltas.columns, deltas.weights * np.float32(unit))

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as arrays that name items by hash, so that another vocabulary can restore it.

        items: uint64 [m]; popularity: float64 [m]; offsets: int64 [m + 1]; neighbours: int32 [pairs], an index into
        items; weights: float32 [pairs]; as_of_ms: int64 [1]. Counts are as of `as_of_ms`.
        """
        rows = self.rows(self.counted())
        index = np.zeros(len(self.vocabulary), np.int32)
        index[rows.tokens] = np.arange(len(rows.tokens))
        filled = (rows.weights > 0) & (self.popularity[rows.columns] > 0)  # the neighbour has an index in `items`
        return {
            "items": self.vocabulary.hashes[rows.tokens],
            "popularity": rows.popularity,
            "offsets": np.concatenate([[0], np.cumsum(filled.sum(axis=1))]),
            "neighbours": index[rows.columns[filled]],
            "weights": rows.weights[filled],
            "as_of_ms": np.array([self.newest_ms], np.int64),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a saved state; items outside the vocabulary are left out."""
        tokens = self.vocabulary.tokens(state["items"])
        for start in range(0, len(tokens), RESTORE_ITEMS):
            self._restore(state, tokens, slice(start, start + RESTORE_ITEMS))
        self._order = PopularityOrder(self.vocabulary.max_tokens)

    def _restore(self, state: Mapping[str, np.ndarray], tokens: np.ndarray, part: slice) -> None:
        """Restore a part of the saved items. tokens: int32 of all of them, 0 outside the vocabulary."""
        offsets = state["offsets"][part.start : part.stop + 1]
        pairs = slice(offsets[0], offsets[-1])
        slots = self.neighbours.tokens.shape[1]
        neighbours = tokens[state["neighbours"][pairs]]
        columns, weights = pad_rows(offsets - offsets[0], neighbours, state["weights"][pairs], slots)
        in_vocabulary = tokens[part] > 0
        self.replace_rows(
            ItemCounts(
                tokens=tokens[part][in_vocabulary],
                popularity=state["popularity"][part][in_vocabulary],
                as_of_ms=np.full(int(in_vocabulary.sum()), state["as_of_ms"][0]),
                columns=columns[in_vocabulary],
                weights=weights[in_vocabulary],
            )
        )

    def _add_logged(self, tokens: np.ndarray, log: DeltaLog) -> None:
        """Add the logged counts of these items."""
        replaced = np.zeros(len(self.vocabulary), bool)
        replaced[tokens] = True
        for rows, columns, weights in log.chunks:
            own = replaced[rows] & (columns == 0)
            pair = replaced[rows] & (columns > 0)
            np.add.at(self.popularity, rows[own], weights[own])
            self.neighbours.add(rows[pair], columns[pair], weights[pair])

    def _count(
        self, tokens: np.ndarray, is_new: np.ndarray, events: np.ndarray, starts: np.ndarray, weights: np.ndarray
    ) -> None:
        """Count the events at these positions and their pairs with the events before them, from `starts` on.

        Events and pairs count if they are new; a pair is as new as the newer of the two, and weighs as the later one.
        """
        one = tokens[events]  # [events]
        other, is_pair = new_pairs(tokens, is_new, events, starts, len(self._distance_weights))
        ones = np.broadcast_to(one[:, None], is_pair.shape)[is_pair]
        others = other[is_pair]
        pair_weights = (weights[:, None] * self._distance_weights)[is_pair].astype(np.float32)
        rows = np.concatenate([ones, others])
        columns = np.concatenate([others, ones])
        both_weights = np.concatenate([pair_weights, pair_weights])
        has_token = (one > 0) & is_new[events]
        items = one[has_token]
        item_weights = weights[has_token]
        np.add.at(self.popularity, items, item_weights)
        self.neighbours.add(rows, columns, both_weights)
        self._order.age += len(items)
        if self.log is not None:
            self.log.add(items, np.zeros(len(items), np.int32), item_weights.astype(np.float32))
            self.log.add(rows, columns, both_weights)

    def _weight_at(self, ts_ms: int) -> float:
        """Return the weight of one event at that time in the stored units."""
        return 2.0 ** ((ts_ms - self._reference_ms) / self._half_life_ms)

    def _unit(self) -> float:
        """Return the factor from stored units to counts as of `newest_ms`."""
        return 1.0 / self._weight_at(self.newest_ms)

    def _advance(self, ts_ms: np.ndarray) -> None:
        """Take these times, int64 [n], to the clock, and move the reference time when the clock is far ahead of it."""
        before_ms = self.newest_ms
        self._clock.advance(ts_ms)
        if self.newest_ms < before_ms:  # no more than a few events have been counted: let them be of the new time
            self._reference_ms -= before_ms - self.newest_ms
        half_lives = (self.newest_ms - self._reference_ms) / self._half_life_ms
        if half_lives > REBASE_HALF_LIVES:
            factor = 2.0**-half_lives
            self.popularity[: len(self.vocabulary)] *= factor
            self.neighbours.scale(factor)
            if self.log is not None:
                self.log.scale(factor)
            self._reference_ms = self.newest_ms

    def _popularity_order(self) -> PopularityOrder:
        self._sync()
        size = len(self.vocabulary)
        self._order.refresh(self.popularity[:size], self.vocabulary.blocked[:size])
        return self._order

    def _sync(self) -> None:
        """Reserve a row per token and drop the counts of evicted items."""
        self._reserve()
        if self._version == self.vocabulary.version:
            return
        evicted = self.vocabulary.evicted_since(self._version)
        changed = self.vocabulary.changes.since(self._followed)
        self._version = self.vocabulary.version
        self._followed = self.vocabulary.changes.end
        if changed is None or evicted.size:
            self._order = PopularityOrder(self.vocabulary.max_tokens)
        else:
            size = len(self.vocabulary)
            self._order.follow(changed, self.popularity[:size], self.vocabulary.blocked[:size])
        if not evicted.size:
            return
        mask = np.zeros(len(self.vocabulary), bool)
        mask[evicted] = True
        self.popularity[evicted] = 0
        self.neighbours.forget(mask)
        if self.log is not None:
            self.log.forget(mask)

    def _reserve(self) -> None:
        rows = len(self.vocabulary)
        self.neighbours.reserve(rows)
        self.popularity = grown(self.popularity, rows, self.vocabulary.max_tokens)


def without_neighbours(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a saved state without its co-occurrence counts: popularity alone ranks."""
    popularity = {name: array[:0] if name in ("neighbours", "weights") else array for name, array in state.items()}
    return popularity | {"offsets": np.zeros_like(state["offsets"])}
