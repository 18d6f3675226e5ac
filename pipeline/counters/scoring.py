"""Scores items by their co-occurrence with a user's latest events, falling back to popularity.

A candidate's score is the sum over the user's latest events of c(a, b) / (p(a)^0.5 p(b)^0.35), where each event counts
RECENCY times as much as its successor.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.counters.accumulator import RowTokenPairs, SparseAccumulator, row_top_k
from pipeline.counters.neighbours import NeighbourTable
from pipeline.counters.popularity import PopularityOrder, fill_rows
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Histories

# Tuned on MovieLens within its first 80 %: counted on the first 60 %, hit rate@10 over the next 20 %. Recency 0.8 to
# 0.85 and 10 to 20 recent events are within noise, recency 0.95 loses 1 point.
RECENT_EVENTS = 10
RECENCY = 0.85
RECENCY_WEIGHTS = (RECENCY ** np.arange(RECENT_EVENTS)).astype(np.float32)
CHUNK_USERS = 32  # temporaries below malloc's mmap threshold: 9 ms for 256 users, 11 ms all at once


class UserChunk(NamedTuple):
    """Some users of the histories, few enough to be scored at once."""

    users: slice
    events: slice  # of these users
    tokens: np.ndarray  # int32 [chunk events]
    offsets: np.ndarray  # int64 [chunk users + 1], from 0


class CooccurrenceScorer:
    """Ranks and scores the neighbours of users' latest events. Used by one thread."""

    def __init__(self, vocabulary: Vocabulary, neighbours: NeighbourTable) -> None:
        self._vocabulary = vocabulary
        self._neighbours = neighbours
        self._accumulator = SparseAccumulator()

    def top_k(
        self, histories: Histories, excluded: np.ndarray, k: int, order: PopularityOrder
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See Counters.top_k."""
        items = np.zeros((len(histories), k), np.int32)
        scores = np.zeros((len(histories), k), np.float32)
        from_cooccurrence = np.zeros((len(histories), k), bool)
        for chunk in self._chunks(histories, order):
            users = chunk.users
            excluded_pairs = _excluded_pairs(chunk, excluded[chunk.events])
            votes, weights = self._votes(chunk, order)
            sums = self._accumulator.sums(votes, weights, excluded_pairs, len(order.ranks))
            items[users], scores[users] = row_top_k(votes, sums * order.item_norms.take(votes), k)
            from_cooccurrence[users] = items[users] > 0
            fill_rows(order, excluded_pairs, items[users], scores[users])
        return items, scores, from_cooccurrence

    def score_items(self, histories: Histories, candidates: np.ndarray, order: PopularityOrder) -> np.ndarray:
        """See Counters.score_items."""
        scores = np.where(candidates > 0, -1.0 - order.ranks[candidates], -np.inf).astype(np.float32)
        for chunk in self._chunks(histories, order):
            users = chunk.users
            votes, weights = self._votes(chunk, order)
            sums = self._accumulator.sums_at(votes, weights, candidates[users], len(order.ranks))
            sums *= order.item_norms[candidates[users]]
            scores[users] = np.where(sums > 0, sums, scores[users])
        return scores

    def _chunks(self, histories: Histories, order: PopularityOrder) -> Iterator[UserChunk]:
        step = min(CHUNK_USERS, self._accumulator.max_rows(len(order.ranks)))
        for start in range(0, len(histories), step):
            offsets = histories.offsets[start : start + step + 1]
            events = slice(offsets[0], offsets[-1])
            tokens = self._vocabulary.tokens(histories.items[events])
            yield UserChunk(slice(start, start + step), events, tokens, offsets - offsets[0])

    def _votes(self, chunk: UserChunk, order: PopularityOrder) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbours of each user's latest events: int32 and float32 [n, RECENT_EVENTS * slots]."""
        positions = chunk.offsets[1:, None] - np.arange(1, RECENT_EVENTS + 1)  # [n, RECENT_EVENTS], latest first
        inside = positions >= chunk.offsets[:-1, None]
        recent = np.where(inside, np.append(chunk.tokens, 0)[np.maximum(positions, 0)], 0)
        coefficients = order.event_norms[recent] * RECENCY_WEIGHTS  # [n, RECENT_EVENTS]
        votes = self._neighbours.tokens[recent].reshape(len(recent), -1)  # [n, RECENT_EVENTS * slots]
        return votes, (self._neighbours.weights[recent] * coefficients[:, :, None]).reshape(votes.shape)


def _excluded_pairs(chunk: UserChunk, excluded: np.ndarray) -> RowTokenPairs:
    """Return (row, token) of each excluded event whose item has a token. excluded: bool [chunk events]."""
    rows = np.repeat(np.arange(len(chunk.offsets) - 1), np.diff(chunk.offsets))
    mask = excluded & (chunk.tokens > 0)
    return rows[mask], chunk.tokens[mask]
