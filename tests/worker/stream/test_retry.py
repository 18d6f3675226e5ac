"""Retriable writes are repeated until they succeed, permanent errors are raised; readiness reports the wait."""

import pytest

from worker.clock import WallClock
from worker.errors import StoreError, StoreUnavailable
from worker.stream.health import HealthState
from worker.stream.retry import Retry


class FlakyStore:
    """Fails with these errors in turn, then succeeds; remembers the readiness problems seen at each attempt."""

    def __init__(self, health: HealthState, *errors: Exception) -> None:
        self.health = health
        self.errors = list(errors)
        self.written: list[list[str]] = []
        self.problems: list[list[str]] = []

    async def write(self, values) -> None:
        self.problems.append(list(self.health.problems.values()))
        if self.errors:
            raise self.errors.pop(0)
        self.written.append(values)


@pytest.fixture
def health() -> HealthState:
    return HealthState(WallClock(), 0.0)


async def test_retriable_error_is_retried_until_the_write_succeeds(health: HealthState):
    store = FlakyStore(health, StoreUnavailable("down"), StoreUnavailable("still down"))
    await Retry(0.001, health)(store.write, ["slate"])
    assert store.written == [["slate"]]
    assert store.problems == [[], ["down"], ["still down"]]
    assert health.problems == {}
    assert 0 < health.next_attempt_s <= health.clock.monotonic(), "the watchdog knows of the last wait"


async def test_permanent_error_is_raised_at_once(health: HealthState):
    store = FlakyStore(health, StoreError("wrong type of key"))
    with pytest.raises(StoreError, match="wrong type"):
        await Retry(0.001, health)(store.write, ["slate"])
    assert store.written == []
    assert len(store.problems) == 1
