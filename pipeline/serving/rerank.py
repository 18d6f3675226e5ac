"""Reranking: the retrieval's candidates, more than the slate holds, ordered by what the shop wants of them.

A retrieval score is a log probability, up to a constant, that the item is the user's next. So
    score + w_e log P(engaged) + w_r log P(returns) + w_m log P(paid) + w_v log(value)
with weights of 1 orders by the expected number of engaged, returning or paying takes, with w_m = w_v = 1 by the
expected money; smaller weights lean towards it. All 0: the retrieval's own order.
"""

from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.types import NonNegativeFloat

PROBABILITY_FLOOR = 1e-6


class RerankWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the heads' odds, and of the item's value, in the order of a slate."""

    engagement: NonNegativeFloat = 0.0
    retention: NonNegativeFloat = 0.0
    monetization: NonNegativeFloat = 0.0
    value: NonNegativeFloat = (
        0.0  # of the item, see worth.item_values; an item without one counts as the median of the others
    )
    candidates: Annotated[int, Meta(ge=1, le=10_000)] = 100  # that a slate is chosen from, when a weight is not 0

    @property
    def enabled(self) -> bool:
        return any((self.engagement, self.retention, self.monetization, self.value))

    def n_candidates(self, k: int) -> int:
        """How many candidates a slate of k items is chosen from."""
        return max(k, self.candidates) if self.enabled else k


def blend_scores(
    scores: np.ndarray, probabilities: np.ndarray, log_values: np.ndarray, weights: RerankWeights
) -> np.ndarray:
    """float32 [n, c]: what orders the candidates, higher first.

    scores: float [n, c], -inf = no item; odds: float [n, c, 3] by labels.TASKS; log_values: float [n, c], of `logs_of`
    """
    of_tasks = np.array([weights.engagement, weights.retention, weights.monetization], np.float32)
    of_odds = np.log(np.maximum(probabilities, PROBABILITY_FLOOR)) @ of_tasks
    return (scores + of_odds + np.float32(weights.value) * log_values).astype(np.float32)


def log_item_values(values: np.ndarray) -> np.ndarray:
    """float32 [items]: logarithms of all items' values, the median's where a value is 0, unknown."""
    known = values[values > 0]
    usual = np.median(known) if known.size else 1.0
    return np.log(np.where(values > 0, values, usual)).astype(np.float32)
