"""Expected business outcome of slates: engagement, retention, monetization and value by the heads' probabilities.

The user takes the item at rank r with a probability in proportion to 1 / log2(1 + r), NDCG's discount. Then
    engagement, retention, monetization   probability that the taken item engages, brings a return, is paid
    value                                 expected revenue: monetization probability times the item's value
Items' values are those of the training log, see features/item_values.py.
"""

import numpy as np

from pipeline.evaluation.ranking import Recommender
from pipeline.features.labels import TASKS
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import Histories
from pipeline.strategies.strategy import RankedItems

BUSINESS_METRICS = (*TASKS, "value")


def business_metrics(ranked: RankedItems, k: int) -> np.ndarray | None:
    """Return float64 [n, 4] by BUSINESS_METRICS, of the first k ranks; zeros for an empty slate.

    None for a strategy without heads.
    """
    if ranked.heads is None or ranked.values is None:
        return None
    probabilities = ranked.heads[:, :k]
    values = ranked.values[:, :k]
    is_item = ranked.tokens[:, :k] != UNKNOWN
    weights = is_item / np.log2(np.arange(2, is_item.shape[1] + 2))
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    revenue = probabilities[..., TASKS.index("monetization")] * values
    outcomes = np.concatenate([probabilities, revenue[..., None]], axis=2)
    return np.einsum("nk,nkm->nm", weights, outcomes.astype(np.float64))


class BusinessMetricsRecorder:
    """A recommender that adds up the business metrics of its slates' first k ranks."""

    def __init__(self, ranker: Recommender, k: int) -> None:
        self._ranker = ranker
        self._k = k
        self._total = np.zeros(len(BUSINESS_METRICS))
        self._slates = 0

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """Rank by the recommender and add the slates' metrics to the totals."""
        ranked = self._ranker.rank(histories, k)
        if (metrics := business_metrics(ranked, self._k)) is not None:
            self._total += metrics.sum(axis=0)
            self._slates += len(metrics)
        return ranked

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        return self._ranker.scores(histories, tokens)

    def means(self) -> dict[str, float]:
        """Return the means over all slates, by BUSINESS_METRICS; empty when nothing was ranked."""
        return dict(zip(BUSINESS_METRICS, (self._total / self._slates).tolist(), strict=True)) if self._slates else {}
