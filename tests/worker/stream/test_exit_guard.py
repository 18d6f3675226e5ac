"""The guard ends a process whose event loop or way out hangs, and no other. tests/faults has it end real ones."""

import pytest

from tests.worker.clocks import ManualClock
from worker.config import HealthConfig
from worker.deadline import Deadline
from worker.stream.exit_guard import GRACE_S, ExitGuard
from worker.stream.health import HealthState


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def guard(clock: ManualClock) -> ExitGuard:
    return ExitGuard(HealthConfig(stall_timeout_s=60), HealthState(clock, clock.now_s), Deadline(clock))


def test_event_loop_that_does_not_run_is_ended_after_the_stall_timeout(clock: ManualClock, guard: ExitGuard):
    clock.now_s += 60
    assert guard._reason() is None
    clock.now_s += 1
    assert guard._reason() == "the event loop has not run for 61 s"
    guard._health.heartbeat_s = clock.now_s
    assert guard._reason() is None


def test_process_that_was_suspended_as_a_whole_is_spared(clock: ManualClock, guard: ExitGuard):
    clock.now_s += 1000
    guard._resumed_s = clock.now_s
    assert guard._reason() is None


def test_way_out_is_ended_after_its_deadline(clock: ManualClock, guard: ExitGuard):
    guard._deadline.start(20)
    clock.now_s += 20 + GRACE_S
    guard._health.heartbeat_s = clock.now_s
    assert guard._reason() is None
    clock.now_s += 0.1
    assert "did not end within health.drain_timeout_s" in (guard._reason() or "")
