"""A ranker from any scorer of the full catalogue: the baselines' common part."""

import time
from typing import Protocol

import numpy as np

from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.strategy import RankedItems


class CatalogueScorer(Protocol):
    """Scores each item of the catalogue as a user's next one, also for a user without events."""

    name: str

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return float32 [n, items], higher is better; the caller may change the array.

        tokens: int32 [total], of the histories' events
        """
        ...


class FullRanking:
    """Implements pipeline.evaluation.ranking.Recommender."""

    def __init__(self, scorer: CatalogueScorer, vocabulary: Vocabulary, exclusion: Exclusion) -> None:
        self._scorer = scorer
        self._vocabulary = vocabulary
        self._exclusion = exclusion

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """See Recommender."""
        start_s = time.perf_counter()
        tokens = self._vocabulary.tokens(histories.items)
        excluded = self._exclusion.mask(histories)
        scores = self._scorer.score(histories, tokens)  # [n, items]
        scores[histories.users[excluded], tokens[excluded]] = -np.inf
        scores[:, UNKNOWN] = -np.inf
        best, best_scores = column_top_k(scores, k)
        rank_ms = 1e3 * (time.perf_counter() - start_s)
        return RankedItems(best, best_scores, None, self._scorer.name, rank_ms=rank_ms)

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return float32 [n, c], the scores of candidates, int32 [n, c]; -inf for token 0."""
        scores = self._scorer.score(histories, self._vocabulary.tokens(histories.items))
        scores[:, UNKNOWN] = -np.inf
        return np.take_along_axis(scores, tokens, axis=1)


def column_top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best finite columns of each row, int32 [n, k], best first, 0 where there is none; and their scores.

    Ties are broken by column.
    """
    width = min(k, scores.shape[1])
    best = np.zeros((len(scores), k), np.int32)
    best_scores = np.full((len(scores), k), -np.inf, np.float32)
    columns = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.lexsort((columns, -values), axis=1)
    best_scores[:, :width] = np.take_along_axis(values, order, axis=1)
    best[:, :width] = np.take_along_axis(columns, order, axis=1)
    best[~np.isfinite(best_scores)] = UNKNOWN
    return best, best_scores


def popularity_scores(weights: np.ndarray) -> np.ndarray:
    """Return float32 [n, items]: minus each item's rank, from 1, in its row by falling weight, ties by token.

    weights: float [n, items]. No two scores of a row are equal, and all are below 0, so that a scorer can put them
    after its own positive scores.
    """
    order = np.argsort(-weights, axis=1, kind="stable")
    return (-1.0 - np.argsort(order, axis=1)).astype(np.float32)
