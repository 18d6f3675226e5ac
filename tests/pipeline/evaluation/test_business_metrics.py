import numpy as np
import pytest

from pipeline.evaluation.business_metrics import BUSINESS_METRICS, BusinessMetricsRecorder, business_metrics
from pipeline.records import EventSchema, Histories
from pipeline.strategies.strategy import RankedItems

SCHEMA = EventSchema()


def rank(tokens: list[list[int]], probabilities: list[list[list[float]]], values: list[list[float]]) -> RankedItems:
    scores = np.zeros(np.shape(tokens), np.float32)
    return RankedItems(np.array(tokens), scores, np.array(probabilities), "hstu", values=np.array(values))


TWO_ITEMS = rank([[5, 6]], [[[0.5, 0.2, 0.1], [0.1, 0.4, 0.3]]], [[10.0, 20.0]])


def test_slate_metrics_average_its_items_by_rank_discount() -> None:
    discounts = np.array([1.0, 1 / np.log2(3)])
    weights = discounts / discounts.sum()
    metrics = business_metrics(TWO_ITEMS, 2)
    assert metrics is not None
    assert dict(zip(BUSINESS_METRICS, metrics[0].tolist(), strict=True)) == pytest.approx(
        {
            "engagement": weights @ [0.5, 0.1],
            "retention": weights @ [0.2, 0.4],
            "monetization": weights @ [0.1, 0.3],
            "value": weights @ [1.0, 6.0],
        }
    )


def test_only_the_first_k_ranks_with_an_item_count() -> None:
    first = business_metrics(TWO_ITEMS, 1)
    assert first is not None
    np.testing.assert_allclose(first[0], [0.5, 0.2, 0.1, 1.0])
    padded = rank([[5, 0], [0, 0]], [[[0.5, 0.2, 0.1], [0.9, 0.9, 0.9]]] * 2, [[10.0, 99.0]] * 2)
    metrics = business_metrics(padded, 2)
    assert metrics is not None
    np.testing.assert_allclose(metrics, [[0.5, 0.2, 0.1, 1.0], [0, 0, 0, 0]])


def test_strategy_without_heads_has_no_business_metrics() -> None:
    assert business_metrics(RankedItems(np.ones((1, 2), np.int32), np.zeros((1, 2)), None, "simple"), 2) is None


class ConstantRecommender:
    def rank(self, histories: Histories, k: int) -> RankedItems:
        return TWO_ITEMS

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        return np.zeros(tokens.shape, np.float32)


def test_recorder_passes_slates_on_and_averages_over_them() -> None:
    recorder = BusinessMetricsRecorder(ConstantRecommender(), 1)
    histories = Histories.from_events([[]], SCHEMA)
    assert recorder.means() == {}
    assert recorder.rank(histories, 2) is TWO_ITEMS
    recorder.rank(histories, 2)
    assert recorder.means() == pytest.approx(dict(zip(BUSINESS_METRICS, [0.5, 0.2, 0.1, 1.0], strict=True)))
