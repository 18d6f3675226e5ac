"""Writes that must happen are repeated, what repeating cannot mend is raised; readiness tells of it meanwhile."""

import asyncio

import pytest

from worker.clock import WallClock
from worker.errors import StoreError, StoreUnavailable
from worker.stream.health import HealthState
from worker.stream.retry import Retry


class Flaky:
    def __init__(self, *errors: Exception) -> None:
        self.errors, self.done, self.seen = list(errors), [], []

    async def write(self, what: list, pulse: HealthState) -> None:
        self.seen.append(dict(pulse.problems))
        if self.errors:
            raise self.errors.pop(0)
        self.done.append(what)


def attempt(flaky: Flaky) -> HealthState:
    pulse = HealthState(WallClock(), 0.0)

    async def act(what: list) -> None:
        await flaky.write(what, pulse)

    asyncio.run(Retry(0.001, pulse)(act, ["slate"]))
    return pulse


def test_a_retriable_error_is_repeated_until_the_write_is_done():
    flaky = Flaky(StoreUnavailable("away"), StoreUnavailable("still away"))
    pulse = attempt(flaky)
    assert flaky.done == [["slate"]]
    assert [list(problems.values()) for problems in flaky.seen] == [[], ["away"], ["still away"]]
    assert pulse.problems == {}


def test_an_error_that_repeating_cannot_mend_is_raised_at_once():
    flaky = Flaky(StoreError("wrong type of key"))
    with pytest.raises(StoreError, match="wrong type"):
        attempt(flaky)
    assert flaky.done == []
    assert len(flaky.seen) == 1
