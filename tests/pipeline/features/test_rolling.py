"""Rolling windows against plain loops over each user's events."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.features import rolling
from pipeline.features.rolling import RollingWindows

users = st.lists(st.lists(st.integers(1, 5), max_size=20), min_size=1, max_size=6)


def packed(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    return np.array([value for history in histories for value in history], np.uint64), offsets


def before(history: list[int], position: int, size: int) -> list[int]:
    return history[max(0, position - size + 1) : position]


@given(users, st.integers(1, 8))
def test_repeats_count_within_the_users_window(histories: list[list[int]], size: int) -> None:
    values, offsets = packed(histories)
    expected = [before(each, n, size).count(value) for each in histories for n, value in enumerate(each)]
    assert RollingWindows(offsets, size).repeats(values * np.uint64(0x9E3779B97F4A7C15)).tolist() == expected


@given(users, st.integers(1, 8))
def test_sums_and_means_cover_the_users_window(histories: list[list[int]], size: int) -> None:
    column, offsets = packed(histories)
    window = RollingWindows(offsets, size)
    own = [[*before(each, n, size), value] for each in histories for n, value in enumerate(each)]
    assert window.sums(column).tolist() == [sum(part) for part in own]
    means = window.means(column.astype(float), column > 2)
    for mean, part in zip(means, ([value for value in part if value > 2] for part in own), strict=True):
        assert np.isnan(mean) if not part else mean == pytest.approx(sum(part) / len(part))


def test_repeats_are_equal_when_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 6, length).tolist() for length in (3, 40, 0, 2, 9, 1, 1, 30)]
    values, offsets = packed(histories)
    expected = RollingWindows(offsets).repeats(values)
    monkeypatch.setattr(rolling, "POSITION_BITS", 4)
    monkeypatch.setattr(rolling, "USER_BITS", 10)
    assert (RollingWindows(offsets).repeats(values) == expected).all()
