"""Background tasks that fail are reported and started again; whoever owns them goes on."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY

from worker.backoff import Backoff
from worker.clock import WallClock
from worker.errors import StoreError
from worker.stream.health import HealthState
from worker.stream.supervisor import Supervisor

Eventually = Callable[..., Awaitable[Any]]
Logged = Callable[[], list[dict[str, Any]]]
AT_ONCE = Backoff(first_s=0.01, cap_s=0.01)


class FlakyTask:
    """Fails with these errors in turn, then runs until it is cancelled. None stands for a return."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.starts = 0
        self.running = False
        self.ended = False

    async def run(self) -> None:
        self.starts += 1
        if self.errors:
            error = self.errors.pop(0)
            if error is not None:
                raise error
            return
        self.running = True
        try:
            await asyncio.Future()
        finally:
            self.ended = True


@pytest.fixture
def health() -> HealthState:
    return HealthState(WallClock(), ready=True)


def failures(name: str) -> float:
    return REGISTRY.get_sample_value("millrace_background_failures_total", {"task": name}) or 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("broken"), "ValueError('broken')"),
        (StoreError("wrong type of key"), "wrong type of key"),
        (asyncio.CancelledError(), "CancelledError()"),
        (None, "it returned"),
    ],
)
async def test_failed_task_is_named_counted_and_started_again(
    health: HealthState, eventually: Eventually, logged: Logged, error: BaseException | None, reason: str
):
    name = f"task-{reason}"
    task = FlakyTask(error)
    async with Supervisor(health, AT_ONCE, stable_s=0.3).running({name: task.run}):
        await eventually(lambda: task.running)
        ready, text = health.serving()
        assert not ready
        assert text.startswith(f"{name}: ")
        assert reason in text
        assert failures(name) == 1
        [line] = logged()
        assert (line["task"], line["error"]) == (name, health.problems[name])
        assert ("traceback" in line) == (not isinstance(error, StoreError))
        await eventually(lambda: health.serving()[0])
    assert task.starts == 2
    assert task.ended


async def test_traceback_names_the_line_that_raised(health: HealthState, eventually: Eventually, logged: Logged):
    task = FlakyTask(ValueError("broken"))
    async with Supervisor(health, AT_ONCE).running({"task": task.run}):
        await eventually(lambda: task.running)
    [line] = logged()
    assert "in run" in line["traceback"]
    assert line["traceback"].endswith("ValueError: broken\n")


async def test_delays_grow_until_the_task_has_run_for_a_while(
    health: HealthState, eventually: Eventually, logged: Logged
):
    task = FlakyTask(*[ValueError(number) for number in range(3)])
    async with Supervisor(health, Backoff(first_s=0.01, cap_s=0.02)).running({"task": task.run}):
        await eventually(lambda: task.running)
    assert [line["restart_in_s"] for line in logged()] == [0.01, 0.02, 0.02]


async def test_one_task_that_fails_does_not_end_the_others(health: HealthState, eventually: Eventually):
    good = FlakyTask()
    bad = FlakyTask(*[ValueError("broken")] * 5)
    async with Supervisor(health, AT_ONCE).running({"good": good.run, "bad": bad.run}):
        await eventually(lambda: bad.running)
        assert (good.starts, good.ended) == (1, False)
    assert good.ended
    assert bad.ended


async def test_end_of_the_body_cancels_the_tasks_also_between_two_starts(health: HealthState, eventually: Eventually):
    task = FlakyTask(ValueError("broken"))
    async with Supervisor(health, Backoff(3600, 3600)).running({"task": task.run}):
        await eventually(lambda: health.problems)
    assert task.starts == 1
    assert health.problems == {}


async def test_error_of_a_task_that_is_cancelled_is_reported_and_it_is_not_started_again(
    health: HealthState, eventually: Eventually, logged: Logged
):
    starts = 0

    async def fail_at_the_end() -> None:
        nonlocal starts
        starts += 1
        try:
            await asyncio.Future()
        finally:
            raise ValueError("the last merge failed")

    async with Supervisor(health, AT_ONCE).running({"task": fail_at_the_end}):
        await eventually(lambda: starts)
    assert starts == 1
    [line] = logged()
    assert (line["error"], line["restart_in_s"]) == ("ValueError('the last merge failed')", None)
