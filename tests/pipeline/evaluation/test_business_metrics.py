import numpy as np
import pytest

from pipeline.evaluation.business_metrics import (
    BUSINESS_METRICS,
    BusinessMetricsRecorder,
    business_metrics,
    item_values,
)
from pipeline.records import Event, EventSchema, Histories
from pipeline.serving.strategy import RankedItems

SCHEMA = EventSchema()


def ranked(tokens: list[list[int]], odds: list[list[list[float]]], values: list[list[float]]) -> RankedItems:
    scores = np.zeros(np.shape(tokens), np.float32)
    return RankedItems(np.array(tokens), scores, np.array(odds), "hstu", values=np.array(values))


TWO = ranked([[5, 6]], [[[0.5, 0.2, 0.1], [0.1, 0.4, 0.3]]], [[10.0, 20.0]])


def test_a_slate_is_worth_what_its_items_bring_by_the_discount_of_their_ranks() -> None:
    first, second = 1.0, 1 / np.log2(3)
    shares = np.array([first, second]) / (first + second)
    measures = business_metrics(TWO, 2)
    assert measures is not None
    assert dict(zip(BUSINESS_METRICS, measures[0].tolist(), strict=True)) == pytest.approx(
        {
            "engagement": shares @ [0.5, 0.1],
            "retention": shares @ [0.2, 0.4],
            "monetization": shares @ [0.1, 0.3],
            "value": shares @ [1.0, 6.0],
        }
    )


def test_only_the_first_ranks_count_and_a_place_without_an_item_counts_nothing() -> None:
    alone = business_metrics(TWO, 1)
    assert alone is not None
    np.testing.assert_allclose(alone[0], [0.5, 0.2, 0.1, 1.0])
    padded = ranked([[5, 0], [0, 0]], [[[0.5, 0.2, 0.1], [0.9, 0.9, 0.9]]] * 2, [[10.0, 99.0]] * 2)
    np.testing.assert_allclose(business_metrics(padded, 2), [[0.5, 0.2, 0.1, 1.0], [0, 0, 0, 0]])


def test_a_rung_without_heads_has_no_worth() -> None:
    assert business_metrics(RankedItems(np.ones((1, 2), np.int32), np.zeros((1, 2)), None, "simple"), 2) is None


def test_an_items_value_is_the_mean_of_what_was_paid_for_it() -> None:
    events = [
        Event("u", "a", "cart", 1, value=10.0),
        Event("u", "a", "purchase", 2, value=20.0),
        Event("u", "a", "view", 3, value=500.0),
        Event("u", "b", "purchase", 4),
        Event("u", "c", "view", 5),
        Event("u", "unknown", "purchase", 6, value=3.0),
    ]
    histories = Histories.from_events([events], SCHEMA)
    values = item_values(histories, np.array([1, 1, 1, 2, 3, 0]), SCHEMA, 4)
    assert values.tolist() == pytest.approx([0, 15, 0, 0], rel=1e-3)


class OneSlate:
    def rank(self, histories: Histories, k: int) -> RankedItems:
        return TWO

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        return np.zeros(tokens.shape, np.float32)


def test_what_is_weighed_is_passed_on_and_the_means_are_of_all_slates() -> None:
    weighed, nobody = BusinessMetricsRecorder(OneSlate(), 1), Histories.from_events([[]], SCHEMA)
    assert weighed.means() == {}
    assert weighed.rank(nobody, 2) is TWO
    weighed.rank(nobody, 2)
    assert weighed.means() == pytest.approx(dict(zip(BUSINESS_METRICS, [0.5, 0.2, 0.1, 1.0], strict=True)))
