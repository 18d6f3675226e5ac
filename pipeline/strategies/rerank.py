"""Reranking: order the retrieval's candidates, more than a slate holds, by configured business goals.

A retrieval score is a log probability, up to a constant, that the item is the user's next. So
    score + w_e log P(engaged) + w_r log P(returns) + w_m log P(paid) + w_v log(value)
with a weight of 1 orders by the expected number of engaged, returning or paying interactions, with w_m = w_v = 1 by the
expected money; smaller weights lean towards it. All 0: the retrieval's own order.
"""

from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.types import NonNegativeFloat

if TYPE_CHECKING:
    from torch import Tensor

PROBABILITY_FLOOR = 1e-6


class RerankWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the heads' probabilities and of the item's value in the order of a slate."""

    engagement: NonNegativeFloat = 0.0  # off: a trade-off against relevance that only a business can choose
    retention: NonNegativeFloat = 0.0  # off, as above; its head depends on the item only slightly
    monetization: NonNegativeFloat = 0.0  # off, as above; with monetization = value = 1, the order by expected money
    # Off, as above; see pipeline/features/item_values.py. An item without a value counts as the median of the others.
    value: NonNegativeFloat = 0.0
    candidates: Annotated[int, Meta(ge=1, le=10_000)] = 100  # per slate, when any weight is above 0

    @property
    def enabled(self) -> bool:
        return any((self.engagement, self.retention, self.monetization, self.value))

    def n_candidates(self, k: int) -> int:
        """Return the number of candidates to retrieve for a slate of k items."""
        return max(k, self.candidates) if self.enabled else k


def blend_scores(scores: "Tensor", probabilities: "Tensor", log_values: "Tensor", weights: RerankWeights) -> "Tensor":
    """Return blended scores float32 [n, c], higher first.

    scores: float32 [n, c], -inf = no item; probabilities: float32 [n, c, 3] by labels.TASKS
    log_values: float32 [n, c], of `log_item_values`
    """
    blended = scores + weights.value * log_values
    task_weights = weights.engagement, weights.retention, weights.monetization
    for weight, task_probabilities in zip(task_weights, probabilities.unbind(dim=2), strict=True):
        blended = blended + weight * task_probabilities.clamp(min=PROBABILITY_FLOOR).log()
    return blended


def median_value(values: np.ndarray) -> float:
    """Return the median of the known values of all items, float [items], 0 = unknown; 1 when none is known."""
    known = values[values > 0]
    return float(np.median(known)) if known.size else 1.0


def log_item_values(values: "Tensor", median: float) -> "Tensor":
    """Return the logarithms of items' values, float32 of their shape; an unknown value, 0, counts as the median."""
    return values.where(values > 0, median).log()
