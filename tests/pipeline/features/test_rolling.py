import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features import rolling
from pipeline.features.rolling import RollingWindows

users = st.lists(st.lists(st.integers(1, 5), max_size=20), min_size=1, max_size=6)


def packed(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    return np.array([name for history in histories for name in history], np.uint64), offsets


def before(history: list[int], place: int, size: int) -> list[int]:
    return history[max(0, place - size + 1) : place]


@settings(deadline=None)
@given(users, st.integers(1, 8))
def test_repetitions_are_those_of_the_users_own_window(histories: list[list[int]], size: int) -> None:
    names, offsets = packed(histories)
    wanted = [before(each, place, size).count(name) for each in histories for place, name in enumerate(each)]
    assert RollingWindows(offsets, size).repeats(names * np.uint64(0x9E3779B97F4A7C15)).tolist() == wanted


@settings(deadline=None)
@given(users, st.integers(1, 8))
def test_sums_and_means_are_those_of_the_users_own_window(histories: list[list[int]], size: int) -> None:
    column, offsets = packed(histories)
    window = RollingWindows(offsets, size)
    own = [[*before(each, place, size), name] for each in histories for place, name in enumerate(each)]
    assert window.sums(column).tolist() == [sum(part) for part in own]
    means = window.means(column.astype(float), column > 2)
    for mean, part in zip(means, ([name for name in part if name > 2] for part in own), strict=True):
        assert np.isnan(mean) if not part else mean == pytest.approx(sum(part) / len(part))


def test_more_users_and_events_than_a_sort_key_holds_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    histories = [random.integers(1, 6, count).tolist() for count in (3, 40, 0, 2, 9, 1, 1, 30)]
    names, offsets = packed(histories)
    whole = RollingWindows(offsets).repeats(names)
    monkeypatch.setattr(rolling, "POSITION_BITS", 4)
    monkeypatch.setattr(rolling, "USER_BITS", 10)
    assert (RollingWindows(offsets).repeats(names) == whole).all()
