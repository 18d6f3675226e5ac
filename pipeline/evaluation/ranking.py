"""Rank held-out events as serving would have: each from its user's preceding events, by any recommender.

The recommender is frozen, the histories grow. All events count: a user's first event is ranked without a history, and
an item that is excluded for its user cannot be hit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import RankingMetrics, ranking_metrics, target_ranks
from pipeline.jagged import find_rows
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.strategy import RankedItems, Strategy, rank

BATCH_USERS = 256


class Recommender(Protocol):
    """Ranks the catalogue and scores given candidates: a baseline, or a serving strategy as StrategyRecommender."""

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """Return the k best items of the catalogue for each user."""
        ...

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return float32 [n, c], the scores of candidates, int32 [n, c]; higher ranks first within a row.

        -inf: not in the recommender's vocabulary, as token 0.
        """
        ...


class ScoringStrategy(Strategy, Protocol):
    """A serving strategy that also scores given candidates."""

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See Recommender.scores."""
        ...


@dataclass(slots=True)
class StrategyRecommender:
    """Implements Recommender by a serving strategy, one batch after the other."""

    strategy: ScoringStrategy

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """See Recommender."""
        return rank(self.strategy, histories, k)

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See Recommender."""
        return self.strategy.scores(histories, tokens)


@dataclass(slots=True)
class HeldOutEvents:
    """Events of user sequences that are ranked one by one.

    positions: int64 [n] in the sequences; max_events: the latest events of a history that the recommender is given
    """

    sequences: UserSequences
    positions: np.ndarray
    max_events: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def targets(self) -> np.ndarray:
        """Tokens of the events' items, int32 [n]."""
        return self.sequences.tokens[self.positions]

    @property
    def users(self) -> np.ndarray:
        """The events' users, int64 [n], by their index in the sequences."""
        return find_rows(self.sequences.offsets, self.positions)

    @property
    def lengths(self) -> np.ndarray:
        """Number of the user's events before each event, int64 [n]."""
        return self.positions - self.sequences.user_starts(self.positions)

    @property
    def is_tied(self) -> np.ndarray:
        """Whether each event has the time of its user's event before, so that only the log orders the two: bool [n]."""
        ts_ms = self.sequences.histories.ts_ms
        return (self.lengths > 0) & (ts_ms[self.positions] == ts_ms[self.positions - 1])

    def count_excluded(self, exclusion: Exclusion) -> int:
        """Count the events whose item the rule kept off the slate just before: no slate could hit it."""
        excluded = exclusion.excluded_targets(self.sequences.histories, self.max_events)
        return int(excluded[self.positions].sum())

    def batches(self) -> Iterator[tuple[np.ndarray, Histories]]:
        """Yield indices of events, int64 [<= BATCH_USERS], and their histories, grouped by length."""
        order = np.argsort(np.minimum(self.lengths, self.max_events), kind="stable")
        for start in range(0, len(order), BATCH_USERS):
            rows = order[start : start + BATCH_USERS]
            yield rows, self.sequences.histories_before(self.positions[rows], self.max_events)


def excluded_sentence(excluded: int, events: int) -> str:
    """Return why some of the events count as missed by every ranking."""
    return (
        f"{excluded:,} of {events:,} scored items are excluded from their user's slates, because of what the user did"
        " with them before (pipeline.exclude_actions, pipeline.exclude_window_days): no ranking can hit them"
    )


def recommend_slates(ranker: Recommender, test: HeldOutEvents, k: int) -> np.ndarray:
    """Return int32 [n, k]: the k best items of the full catalogue before each event, 0 where there is none."""
    slates = np.empty((len(test), k), np.int32)
    for rows, histories in test.batches():
        slates[rows] = ranker.rank(histories, k).tokens
    return slates


def rank_among_negatives(ranker: Recommender, test: HeldOutEvents, negatives: np.ndarray) -> np.ndarray:
    """Return int64 [n]: the rank, from 1, of each event's item among itself and its negatives, int32 [n, c].

    Ties count against the item; 0 where it is not in the recommender's vocabulary.
    """
    ranks = np.empty(len(test), np.int64)
    for rows, histories in test.batches():
        candidates = np.column_stack([test.targets[rows], negatives[rows]])
        scores = ranker.scores(histories, candidates)
        is_ranked = np.isfinite(scores[:, 0])
        ranks[rows] = np.where(is_ranked, 1 + (scores[:, 1:] >= scores[:, :1]).sum(1), 0)
    return ranks


def evaluate_ranking(ranker: Recommender, test: HeldOutEvents, k: int) -> RankingMetrics:
    """Measure whether each event's item is among the k best of the full catalogue, and at which rank."""
    return ranking_metrics(target_ranks(recommend_slates(ranker, test, k), test.targets), k)
