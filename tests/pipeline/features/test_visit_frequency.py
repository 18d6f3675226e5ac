import numpy as np

from pipeline.features.visit_frequency import N_VISIT_FEATURES, WINDOWS_DAYS, visit_frequency
from pipeline.records import Event, EventSchema, Histories

DAY_MS, MINUTE_MS = 86_400_000, 60_000


def histories(*users: list[int]) -> Histories:
    return Histories.from_events([[Event("u", "i", "view", ts) for ts in times] for times in users], EventSchema())


def counts(packed: Histories) -> list[list[float]]:
    """Whole numbers of sessions, and days, at every event."""
    return np.expm1(visit_frequency(packed, np.arange(len(packed.events))).astype(float)).round(3).tolist()


def test_sessions_are_counted_within_each_window_and_the_running_one_is_among_them() -> None:
    assert WINDOWS_DAYS == (7, 30, 90)
    times = [0, MINUTE_MS, 40 * DAY_MS, 41 * DAY_MS, 41 * DAY_MS + 10 * MINUTE_MS]
    assert counts(histories(times)) == [
        [1, 1, 1, 0],
        [1, 1, 1, 0.001],
        [1, 1, 2, 40],
        [2, 2, 3, 41],
        [2, 2, 3, 41.007],
    ]


def test_a_session_that_began_exactly_a_window_ago_counts_and_a_second_earlier_not() -> None:
    assert counts(histories([0, 7 * DAY_MS]))[1][0] == 2
    assert counts(histories([0, 7 * DAY_MS + 1000]))[1][0] == 1


def test_users_are_counted_apart_and_empty_ones_have_no_rows() -> None:
    alone = counts(histories([0, DAY_MS, 2 * DAY_MS]))
    assert counts(histories([5], [], [0, DAY_MS, 2 * DAY_MS], []))[1:] == alone


def test_later_events_change_nothing_before_them() -> None:
    random = np.random.default_rng(0)
    times = np.cumsum(random.integers(0, 3 * DAY_MS, 60)).tolist()
    whole = visit_frequency(histories(times), np.arange(60))
    for length in (1, 7, 30):
        np.testing.assert_array_equal(visit_frequency(histories(times[:length]), np.arange(length)), whole[:length])


def test_no_events_have_no_rhythm() -> None:
    assert visit_frequency(histories([], []), np.empty(0, np.int64)).shape == (0, N_VISIT_FEATURES)
