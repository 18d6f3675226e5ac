"""The order of popularity with gaps ranks as one that was made anew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.counters import popularity
from pipeline.counters.popularity import UNRANKED, PopularityOrder, fill_rows

ITEMS = 9
counts = st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=ITEMS, max_size=ITEMS)


def updated(popular: np.ndarray, blocked: np.ndarray) -> PopularityOrder:
    order = PopularityOrder()
    order.refresh(popular, blocked)
    return order


def filled(order: PopularityOrder, k: int, excluded: list[int]) -> tuple[list[int], list[float]]:
    items = np.zeros((2, k), np.int32)
    items[1, 0] = 3
    scores = np.zeros((2, k), np.float32)
    scores[1, 0] = 0.5
    fill_rows(order, (np.zeros(len(excluded), np.int64), np.array(excluded, np.int64)), items, scores)
    return items.ravel().tolist(), scores.ravel().tolist()


@given(
    counts=counts,
    toggles=st.lists(st.integers(1, ITEMS), max_size=12),
    first_blocked=st.lists(st.integers(1, ITEMS), max_size=2),
    k=st.integers(1, ITEMS + 2),
    excluded=st.lists(st.integers(1, ITEMS), max_size=3, unique=True),
)
def test_order_with_gaps_equals_an_updated_one(
    counts: list[float], toggles: list[int], first_blocked: list[int], k: int, excluded: list[int]
) -> None:
    popular = np.array([0.0, *counts])
    blocked = np.zeros(ITEMS + 1, bool)
    blocked[[0, *first_blocked]] = True
    order = updated(popular, blocked)
    for token in toggles:
        blocked[token] = not blocked[token]
        order.follow(np.array([token]), popular, blocked)
        order.refresh(popular, blocked)
    expected = updated(popular, blocked)
    for found, right in zip(order.top(k), expected.top(k), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-6)
    np.testing.assert_allclose(order.item_norms, expected.item_norms, rtol=1e-6)
    assert ((order.ranks == UNRANKED) == (expected.ranks == UNRANKED)).all()
    items, scores = filled(order, k, excluded)
    right_items, right_scores = filled(expected, k, excluded)
    assert items == right_items
    np.testing.assert_allclose(scores, right_scores, rtol=1e-6)


def test_blocking_few_tokens_makes_no_new_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "MAX_GAPS", 2)
    popular = np.array([0.0, 9, 8, 7, 6, 5])
    blocked = np.array([True, *[False] * 5])
    order = updated(popular, blocked)
    tokens = order.tokens
    for token in (1, 4):
        blocked[token] = True
        order.follow(np.array([token]), popular, blocked)
        order.refresh(popular, blocked)
        assert order.tokens is tokens
    assert order.top(2)[0].tolist() == [2, 3]
    assert order.top(9)[1].tolist() == pytest.approx([1, 7 / 8, 5 / 8])
    blocked[2] = True
    order.follow(np.array([2]), popular, blocked)
    order.refresh(popular, blocked)
    assert order.tokens.tolist() == [3, 5]
