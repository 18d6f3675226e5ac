"""The `simple` strategy: no model, so it can always answer."""

import time

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.records import Histories
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.strategy import RankedItems


class SimpleStrategy:
    """Ranks by co-occurrence with the history, then by popularity."""

    name = "simple"
    backend = "numpy"

    def __init__(self, counters: Counters, exclusion: Exclusion) -> None:
        self._counters = counters
        self._exclusion = exclusion

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """See Strategy."""
        start = time.perf_counter()
        tokens, scores, cooccurring = self._counters.top_k(histories, self._exclusion.mask(histories), k)
        source = np.where(cooccurring, "cooccurrence", "popular")
        return RankedItems(tokens, scores, None, source, rank_ms=1e3 * (time.perf_counter() - start))

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return scores float32 [n, c] of given items (tokens int32 [n, c]); higher ones rank earlier."""
        return self._counters.score_items(histories, tokens)
