"""One deadline for all steps of the way out: no step extends it, and one that hangs leaves time for the others."""

import asyncio
import math

import pytest

from tests.worker.clocks import ManualClock
from worker.clock import WallClock
from worker.deadline import Deadline


def test_only_the_first_start_counts_and_each_step_gets_half_of_what_is_left():
    clock = ManualClock()
    deadline = Deadline(clock)
    assert (deadline.left_s(), deadline.share_s(10)) == (math.inf, 10)
    deadline.start(8)
    clock.now_s += 2
    deadline.start(100)
    assert (deadline.left_s(), deadline.share_s(), deadline.share_s(1)) == (6, 3, 1)
    clock.now_s += 7
    assert (deadline.left_s(), deadline.share_s()) == (0, 0)


async def test_step_that_hangs_is_cancelled_and_left_and_one_that_fails_is_told():
    deadline = Deadline(WallClock())
    deadline.start(0.1)
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.Event().wait()  # as a client that waits for its server to close

    async def fail() -> None:
        raise OSError("closed")

    async def succeed() -> None: ...

    async with asyncio.timeout(10):
        assert not await deadline.finish(hang(), 60)
        await cancelled.wait()
        assert not await Deadline(WallClock()).finish(fail(), 60)
        assert await Deadline(WallClock()).finish(succeed(), 60)


@pytest.mark.parametrize("most_s", [0.0, 5.0])
def test_share_never_exceeds_the_steps_own_limit(most_s: float):
    assert Deadline(ManualClock()).share_s(most_s) == most_s
