"""The `simple` strategy: no model, so it can always answer."""

import time
from dataclasses import dataclass

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.strategy import RankedItems, Request


@dataclass(slots=True)
class PreparedRequest:
    """A request and, bool [total], the events whose items are excluded."""

    request: Request
    excluded: np.ndarray


class SimpleStrategy:
    """Ranks by co-occurrence with the history, then by popularity."""

    name = "simple"
    backend = "numpy"

    def __init__(self, counters: Counters, exclusion: Exclusion) -> None:
        self._counters = counters
        self._exclusion = exclusion

    def prepare(self, request: Request) -> PreparedRequest:
        """See Strategy."""
        return PreparedRequest(request, self._exclusion.mask(request.histories))

    def launch(self, prepared: PreparedRequest) -> RankedItems:
        """See Strategy. The host is the device: it returns the answer."""
        start_s = time.perf_counter()
        request = prepared.request
        tokens, scores, cooccurring = self._counters.top_k(request.histories, prepared.excluded, request.k)
        source = np.where(cooccurring, "cooccurrence", "popular")
        return RankedItems(tokens, scores, None, source, rank_ms=1e3 * (time.perf_counter() - start_s))

    def finish(self, pending: RankedItems) -> RankedItems:
        """See Strategy."""
        return pending

    def close(self) -> None:
        """Do nothing: the counters outlive every strategy."""

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return scores float32 [n, c] of given items (tokens int32 [n, c]); higher ones rank earlier."""
        return self._counters.score_items(histories, tokens)
