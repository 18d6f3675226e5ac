"""The `simple` rung: no model, so it can always answer."""

import time

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.records import Histories
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.strategy import RankedItems


class SimpleStrategy:
    """Popularity and co-occurrence counters, no model."""

    name = "simple"

    def __init__(self, counters: Counters, exclusion: Exclusion) -> None:
        self._counters, self._exclusion = counters, exclusion

    def rank(self, histories: Histories, k: int) -> RankedItems:
        start = time.perf_counter()
        tokens, scores, cooccurring = self._counters.top_k(histories, self._exclusion.mask(histories), k)
        source = np.where(cooccurring, "cooccurrence", "popular")
        return RankedItems(tokens, scores, None, source, rank_ms=1e3 * (time.perf_counter() - start))

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c]: a row's higher ones rank earlier."""
        return self._counters.score_items(histories, tokens)
