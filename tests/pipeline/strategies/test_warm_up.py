"""Synthetic histories go through the items, and the warm-up's batches have all shapes."""

import numpy as np
import pytest

from pipeline.records import item_hash
from pipeline.strategies.warm_up import synthetic_histories, warm_up_lengths

ITEM_IDS = [f"i{number}" for number in range(5)]


def test_synthetic_histories_have_the_given_lengths_and_the_models_items_in_order() -> None:
    histories = synthetic_histories(ITEM_IDS, [1, 3, 12])
    assert histories.lengths.tolist() == [1, 3, 12]
    assert histories.items[1:4].tolist() == [item_hash(item_id) for item_id in ITEM_IDS[:3]]
    assert set(histories.items.tolist()) == {item_hash(item_id) for item_id in ITEM_IDS}
    assert (np.diff(histories.ts_ms[4:]) > 0).all()
    assert set(histories.actions.tolist()) == {1}


def test_synthetic_histories_of_users_may_begin_at_items_apart() -> None:
    histories = synthetic_histories(ITEM_IDS, [2, 0, 3, 1], items_apart=2)
    expected = [ITEM_IDS[item] for item in (0, 1, 4, 0, 1, 1)]
    assert histories.items.tolist() == [item_hash(item_id) for item_id in expected]


def test_warm_up_lengths_cover_all_sizes_once() -> None:
    batches = list(warm_up_lengths(6, 9))
    assert {len(lengths) for lengths in batches} == {1, 2, 4}
    assert {max(lengths) for lengths in batches} == {1, 2, 9}
    assert len({tuple(lengths) for lengths in batches}) == len(batches)


@pytest.mark.parametrize("users", [1, 2, 16, 256])
def test_warm_up_lengths_have_row_counts_divisible_by_16_and_others(users: int) -> None:
    batches = [lengths for lengths in warm_up_lengths(256, 200) if len(lengths) == users and max(lengths) > 100]
    assert {sum(lengths) % 16 == 0 for lengths in batches} == {True, False}
