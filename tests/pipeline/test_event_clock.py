"""The clock of events: true pauses move it, a few wrong times do not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.event_clock import MIN_VOTES, EventClock

LEAD_MS = 1_000
START_MS = 1_700_000_000_000
FUTURE_MS = START_MS + 10**12


def clock_after(*calls: list[int]) -> EventClock:
    clock = EventClock(LEAD_MS)
    for ts_ms in calls:
        clock.advance(np.array(ts_ms, np.int64))
    return clock


times = st.lists(st.integers(0, 50 * LEAD_MS), min_size=1, max_size=200)


@given(times)
def test_clock_is_at_the_latest_of_times_without_leaps(offsets_ms: list[int]) -> None:
    steps = [START_MS + min(offset, LEAD_MS) for offset in offsets_ms]
    assert clock_after(steps).newest_ms == max(steps)
    assert clock_after(*([step] for step in steps)).newest_ms == max(steps)


@pytest.mark.parametrize("batch", [1, 7, 600])
@pytest.mark.parametrize("at", [0, 1, 5, 300, 599])
def test_one_time_of_the_future_leaves_the_clock_to_the_others(batch: int, at: int) -> None:
    log = [START_MS + number for number in range(600)]
    log[at] = FUTURE_MS
    calls = [log[start : start + batch] for start in range(0, 600, batch)]
    assert clock_after(*calls).newest_ms == max(ts_ms for ts_ms in log if ts_ms != FUTURE_MS)


def test_a_steady_tenth_of_wrong_times_never_moves_the_clock() -> None:
    rng = np.random.default_rng(0)
    clock = EventClock(LEAD_MS)
    for number in range(500):
        ts_ms = np.full(20, START_MS + number)
        ts_ms[rng.random(20) < 0.1] = FUTURE_MS + number
        clock.advance(ts_ms)
    assert clock.newest_ms == START_MS + 499


@pytest.mark.parametrize("batch", [1, 50, 2000])
def test_a_pause_of_the_whole_log_moves_the_clock(batch: int) -> None:
    log = [START_MS + number for number in range(1000)] + [FUTURE_MS + number for number in range(1000)]
    calls = [log[start : start + batch] for start in range(0, 2000, batch)]
    clock = clock_after(*calls[: (1000 + MIN_VOTES - 2) // batch])
    assert clock.newest_ms < FUTURE_MS
    assert clock_after(*calls).newest_ms == FUTURE_MS + 999
