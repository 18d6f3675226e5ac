"""A ranker out of anything that scores the whole catalogue: the baselines' common part."""

import time
from typing import Protocol

import numpy as np

from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import Histories
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.strategy import RankedItems


class CatalogueScorer(Protocol):
    """Knows how good each item of the catalogue is as a user's next, also for a user without events."""

    name: str

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """tokens: int32 [total], of the events -> float32 [n, items], the caller's to change; higher is better."""
        ...


class FullRanking:
    """A pipeline.evaluation.ranking.Ranker."""

    def __init__(self, scorer: CatalogueScorer, vocabulary: Vocabulary, exclusion: Exclusion) -> None:
        self._scorer, self._vocabulary, self._exclusion = scorer, vocabulary, exclusion

    def rank(self, histories: Histories, k: int) -> RankedItems:
        start = time.perf_counter()
        tokens, excluded = self._vocabulary.tokens(histories.items), self._exclusion.mask(histories)
        scores = self._scorer.score(histories, tokens)  # [n, items]
        scores[histories.users[excluded], tokens[excluded]] = -np.inf
        scores[:, UNKNOWN] = -np.inf
        found, best = column_top_k(scores, k)
        return RankedItems(found, best, None, self._scorer.name, rank_ms=1e3 * (time.perf_counter() - start))

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c]; -inf for token 0."""
        scores = self._scorer.score(histories, self._vocabulary.tokens(histories.items))
        scores[:, UNKNOWN] = -np.inf
        return np.take_along_axis(scores, tokens, axis=1)


def column_top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best finite columns of each row: int32 [n, k], best first, 0 where there is none; and their scores."""
    kept = min(k, scores.shape[1])
    found, best = np.zeros((len(scores), k), np.int32), np.full((len(scores), k), -np.inf, np.float32)
    columns = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.lexsort((columns, -values), axis=1)
    best[:, :kept] = np.take_along_axis(values, order, axis=1)
    found[:, :kept] = np.take_along_axis(columns, order, axis=1)
    found[~np.isfinite(best)] = UNKNOWN
    return found, best


def popularity_scores(weights: np.ndarray) -> np.ndarray:
    """float32 [n, items]: minus each item's place in its row by falling weight, from 1, ties by token.

    weights: float [n, items]. No two are equal, and all lie below the scores of a scorer that knows more.
    """
    order = np.argsort(-weights, axis=1, kind="stable")
    return (-1.0 - np.argsort(order, axis=1)).astype(np.float32)
