"""What a slate is worth to the shop, as far as the model knows: business measures of slates, from their heads' odds.

A user takes the item at rank r with a probability in proportion to 1 / log2(1 + r), NDCG's discount. Then
    engagement, retention, monetization   the odds that this one taken item engages, is followed by a return, is paid
    value                                 the money it brings: monetization odds times the item's value
An item's value is the mean of the values of the carts and purchases of it in the training log; 0 where it has none.
"""

import numpy as np

from pipeline.evaluation.ranking import Recommender
from pipeline.features.labels import MONETIZING, TASKS, action_codes
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import EventSchema, Histories, decode_values
from pipeline.serving.strategy import RankedItems

BUSINESS_METRICS = (*TASKS, "value")


def business_metrics(ranked: RankedItems, k: int) -> np.ndarray | None:
    """float64 [n, 4] by MEASURES, of the first k ranks; zeros for an empty slate. None of a rung that has no heads."""
    if ranked.heads is None or ranked.values is None:
        return None
    odds, values, filled = ranked.heads[:, :k], ranked.values[:, :k], ranked.tokens[:, :k] != UNKNOWN
    taken = filled / np.log2(np.arange(2, filled.shape[1] + 2))
    taken /= np.maximum(taken.sum(axis=1, keepdims=True), 1e-12)
    gains = np.concatenate([odds, (odds[..., TASKS.index("monetization")] * values)[..., None]], axis=2)
    return np.einsum("nk,nkm->nm", taken, gains.astype(np.float64))


class BusinessMetricsRecorder:
    """A ranker that adds up what its slates' first k ranks are worth."""

    def __init__(self, ranker: Recommender, k: int) -> None:
        self._ranker, self._k = ranker, k
        self._total, self._slates = np.zeros(len(BUSINESS_METRICS)), 0

    def rank(self, histories: Histories, k: int) -> RankedItems:
        ranked = self._ranker.rank(histories, k)
        if (measures := business_metrics(ranked, self._k)) is not None:
            self._total += measures.sum(axis=0)
            self._slates += len(measures)
        return ranked

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        return self._ranker.scores(histories, tokens)

    def means(self) -> dict[str, float]:
        """By MEASURES; empty when nothing was ranked."""
        return dict(zip(BUSINESS_METRICS, (self._total / self._slates).tolist(), strict=True)) if self._slates else {}


def item_values(histories: Histories, tokens: np.ndarray, schema: EventSchema, items: int) -> np.ndarray:
    """float32 [items]: mean value of each token's carts and purchases; 0 where none told one. tokens: int [total]"""
    paid = np.isin(histories.actions, action_codes(MONETIZING, schema)) & (histories.events["value"] > 0)
    sums = np.bincount(tokens[paid], decode_values(histories.events["value"][paid]), minlength=items)
    counts = np.bincount(tokens[paid], minlength=items)
    values = (sums / np.maximum(counts, 1)).astype(np.float32)
    values[UNKNOWN] = 0
    return values
