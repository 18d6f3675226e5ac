"""A worker that ends says truly what it leaves: open events, and completed ones whose commit was not acknowledged."""

import asyncio

import pytest

from worker.clock import VirtualClock
from worker.config import HealthConfig
from worker.deadline import Deadline
from worker.errors import NotDrained, SourceError
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogRecord, LogSource
from worker.stream.drain import Drain
from worker.stream.health import HealthState
from worker.stream.offset_committer import OffsetCommitter
from worker.stream.offset_tracker import OffsetTracker


class RefusingSource(LogSource):
    """A log whose commits are refused."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(iter(()), clock, "log", 1)
        self.owed: dict[Partition, int] = {}

    async def commit(self, offsets, assignments) -> None:
        self.owed |= offsets
        raise SourceError("refused")

    def uncommitted(self) -> dict[Partition, int]:
        return self.owed


class StaleSource(RefusingSource):
    """A member of a group that is about to rebalance: its commits are skipped."""

    async def commit(self, offsets, assignments) -> None:
        self.owed |= offsets


class CorruptSource(RefusingSource):
    """A topic whose next record cannot be decoded."""

    async def commit(self, offsets, assignments) -> None:
        pass

    async def stop(self) -> None:
        raise SourceError("all records before it are answered and committed")


class MissingTopic(StaleSource):
    def problem(self) -> str:
        return "topic events was deleted"


class Ending:
    """A worker's parts at its end, with two records of a log of which `completed` are answered."""

    def __init__(self, source: type[LogSource], completed: int) -> None:
        clock = VirtualClock()
        config = HealthConfig(drain_timeout_s=0.2)
        is_fake = issubclass(source, RefusingSource)
        self.source = source(clock) if is_fake else LogSource(iter(()), clock, "log", 1)
        self.tracker = OffsetTracker(clock)
        partition = self.source.partition
        self.tracker.assign(partition, 1)
        records = [LogRecord(offset, None, b"", 0, ()) for offset in range(2)]
        self.tracker.open(PolledRecords(partition, 1, 2, 0, 0.0, records))
        self.tracker.complete([RecordOffset(partition, 1, offset) for offset in range(completed)])
        self.offsets = OffsetCommitter(config, self.tracker, self.source)
        health = HealthState(clock)
        self.drain = Drain(config, self.tracker, self.offsets, self.source, health, Deadline(clock))


async def test_all_that_is_answered_and_committed_is_drained():
    ending = Ending(LogSource, completed=2)
    await ending.drain.close()
    ending.drain.check()
    assert ending.source.committed == 2


@pytest.mark.parametrize(
    ("source", "completed", "words"),
    [
        (LogSource, 1, "stopped with 1 events open; completed but not committed: nothing"),
        (RefusingSource, 2, "stopped with 0 events open; completed but not committed: log-0 up to 2"),
        (CorruptSource, 1, "stopped with 1 events open"),
        (MissingTopic, 2, "reads them again. topic events was deleted$"),
    ],
)
async def test_what_is_left_is_named(source: type[LogSource], completed: int, words: str):
    ending = Ending(source, completed)
    await ending.drain.close()
    with pytest.raises(NotDrained, match=words) as caught:
        ending.drain.check()
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("completed", "words"),
    [
        (2, "with 0 events open; completed but not committed: log-0 up to 2"),
        (1, "with 1 events open; .* log-0 up to 1"),
    ],
)
async def test_what_a_rebalance_left_just_before_the_end_is_named(completed: int, words: str):
    ending = Ending(StaleSource, completed)
    await ending.offsets.revoked([ending.source.partition])
    await ending.drain.close()
    with pytest.raises(NotDrained, match=words):
        ending.drain.check()


async def test_what_a_rebalance_left_is_the_next_owners_once_partitions_are_assigned_again():
    ending = Ending(StaleSource, completed=1)
    await ending.offsets.revoked([ending.source.partition])
    ending.source.owed.clear()  # as KafkaSource drops the offsets of a passed assignment
    await ending.offsets.assigned({})
    await ending.drain.close()
    ending.drain.check()
    assert await ending.offsets.commit_rest() == {}


async def test_record_that_cannot_be_decoded_ends_a_worker_that_is_drained():
    ending = Ending(CorruptSource, completed=2)
    await ending.drain.close()
    with pytest.raises(SourceError, match="all records before it are answered"):
        ending.drain.check()


async def test_stop_that_comes_while_an_ended_source_is_drained_bounds_the_answering():
    ending = Ending(LogSource, completed=0)
    hanging = asyncio.create_task(asyncio.Event().wait())
    answering = asyncio.create_task(ending.drain.answer([hanging]))
    await asyncio.sleep(0)
    ending.drain.begin()
    async with asyncio.timeout(10):
        await answering
    assert hanging.cancelling()
