"""Events ranked as serving would have ranked them: each from its user's preceding events, by any ranker.

The ranker is frozen, the histories grow. All events count: a user's first event is ranked without a history, and an
item that the exclusion keeps off its user's slate is on none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import RankingMetrics, ranking_metrics, target_ranks
from pipeline.jagged import find_rows
from pipeline.records import Histories
from pipeline.serving.strategy import RankedItems

BATCH_USERS = 256


class Recommender(Protocol):
    """A rung of the ladder that evaluation can ask is one, and so is every baseline."""

    def rank(self, histories: Histories, k: int) -> RankedItems: ...

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c]: a row's higher ones come first; -inf: not known, as token 0."""
        ...


@dataclass(slots=True)
class HeldOutEvents:
    """Events of a corpus that are ranked one by one.

    positions: int64 [n] in the corpus; cap_events: the newest events of a history that the ranker is given
    """

    sequences: UserSequences
    positions: np.ndarray
    max_events: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def targets(self) -> np.ndarray:
        """int32 [n]: the tokens of the events' items."""
        return self.sequences.tokens[self.positions]

    @property
    def users(self) -> np.ndarray:
        """int64 [n]: the events' users, by their number in the corpus."""
        return find_rows(self.sequences.offsets, self.positions)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n]: how many events came before."""
        return self.positions - self.sequences.user_starts(self.positions)

    def batches(self) -> Iterator[tuple[np.ndarray, Histories]]:
        """Which of the events, int64 [<= BATCH_USERS], and their histories: like lengths meet."""
        order = np.argsort(np.minimum(self.lengths, self.max_events), kind="stable")
        for start in range(0, len(order), BATCH_USERS):
            chosen = order[start : start + BATCH_USERS]
            yield chosen, self.sequences.histories_before(self.positions[chosen], self.max_events)


def slates_of(ranker: Recommender, scored: HeldOutEvents, k: int) -> np.ndarray:
    """int32 [n, k]: the tokens of the k best items of the whole catalogue before each event, 0 where there is none."""
    slates = np.empty((len(scored), k), np.int32)
    for chosen, histories in scored.batches():
        slates[chosen] = ranker.rank(histories, k).tokens
    return slates


def ranks_among(ranker: Recommender, scored: HeldOutEvents, negatives: np.ndarray) -> np.ndarray:
    """int64 [n]: the place from 1 of each event's item among itself and its negatives, int32 [n, c].

    Ties count against the item; 0 where it is not known to the ranker.
    """
    ranks = np.empty(len(scored), np.int64)
    for chosen, histories in scored.batches():
        tokens = np.column_stack([scored.targets[chosen], negatives[chosen]])
        scores = ranker.scores(histories, tokens)
        places = 1 + (scores[:, 1:] >= scores[:, :1]).sum(1)
        ranks[chosen] = np.where(np.isfinite(scores[:, 0]), places, 0)
    return ranks


def evaluate_ranking(ranker: Recommender, scored: HeldOutEvents, k: int) -> RankingMetrics:
    """Whether each event's item was among the k best of the whole catalogue, and where."""
    return ranking_metrics(target_ranks(slates_of(ranker, scored, k), scored.targets), k)
