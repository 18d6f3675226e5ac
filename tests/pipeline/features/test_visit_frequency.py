"""Sessions per window and days since the first event, at every event."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.features.visit_frequency import N_VISIT_FEATURES, WINDOWS_DAYS, latest_visit_frequency, visit_frequency
from pipeline.records import DAY_MS, MAX_TS_MS, Event, EventSchema, Histories

MINUTE_MS = 60_000
RING = 100


def histories(*users: list[int]) -> Histories:
    return Histories.from_events([[Event("u", "i", "view", ts) for ts in times] for times in users], EventSchema())


def counts(packed: Histories) -> list[list[float]]:
    """Return the numbers of sessions, and the days, at every event."""
    return np.expm1(visit_frequency(packed, np.arange(len(packed.events)), RING).astype(float)).round(3).tolist()


def test_sessions_are_counted_per_window_including_the_current_one() -> None:
    assert WINDOWS_DAYS == (7, 30, 90)
    times = [0, MINUTE_MS, 40 * DAY_MS, 41 * DAY_MS, 41 * DAY_MS + 10 * MINUTE_MS]
    assert counts(histories(times)) == [
        [1, 1, 1, 0],
        [1, 1, 1, 0.001],
        [1, 1, 2, 40],
        [2, 2, 3, 41],
        [2, 2, 3, 41.007],
    ]


def test_window_includes_its_exact_start() -> None:
    assert counts(histories([0, 7 * DAY_MS]))[1][0] == 2
    assert counts(histories([0, 7 * DAY_MS + 1000]))[1][0] == 1


def test_users_are_counted_separately() -> None:
    alone = counts(histories([0, DAY_MS, 2 * DAY_MS]))
    assert counts(histories([5], [], [0, DAY_MS, 2 * DAY_MS], []))[1:] == alone


def test_later_events_do_not_change_earlier_features() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.integers(0, 3 * DAY_MS, 60)).tolist()
    full = visit_frequency(histories(times), np.arange(60), RING)
    for length in (1, 7, 30):
        part = visit_frequency(histories(times[:length]), np.arange(length), RING)
        np.testing.assert_array_equal(part, full[:length])


@given(st.lists(st.integers(0, 2 * DAY_MS), min_size=1, max_size=40), st.integers(1, 45))
def test_training_reads_what_a_ring_of_serving_still_shows(gaps: list[int], ring_events: int) -> None:
    times = np.cumsum([gap // DAY_MS * gap for gap in gaps]).tolist()  # half of the events share a time
    rings = [times[max(0, end - ring_events) : end] for end in range(1, len(times) + 1)]
    in_training = visit_frequency(histories(times), np.arange(len(times)), ring_events)
    np.testing.assert_array_equal(in_training, latest_visit_frequency(histories(*rings)))


def test_no_events_give_no_rows() -> None:
    assert visit_frequency(histories([], []), np.empty(0, np.int64), RING).shape == (0, N_VISIT_FEATURES)


def test_users_whose_times_are_ages_apart_do_not_disturb_each_other() -> None:
    others = [0, DAY_MS, 2 * DAY_MS]
    alone = counts(histories(others))
    found = counts(histories([0, MAX_TS_MS], others, [5, MAX_TS_MS], others))
    assert found[2:5] == found[7:10] == alone
    assert found[1] == found[6] == [1, 1, 1, 90]
