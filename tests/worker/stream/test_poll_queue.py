"""Waiting polls are taken together; a closed queue is emptied first."""

import asyncio

from worker.interfaces import Partition, PolledRecords
from worker.replay.log_source import LogRecord
from worker.stream.poll_queue import PollQueue


def polled(partition: int) -> PolledRecords:
    record = LogRecord(0, None, b"x", 0, ())
    return PolledRecords(Partition("events", partition), 1, 0, 0, 0.0, [record])


async def test_waiting_polls_are_taken_together_in_order() -> None:
    queue = PollQueue()
    for partition in (2, 0, 1):
        queue.put([polled(partition)])
    assert [records.partition.partition for [records] in await queue.take()] == [2, 0, 1]


async def test_take_waits_for_a_poll_and_returns_empty_only_when_closed() -> None:
    queue = PollQueue()
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not taking.done()
    queue.put([polled(0)])
    assert len(await taking) == 1
    queue.put([polled(1)])
    queue.close()
    assert len(await queue.take()) == 1
    assert await queue.take() == []


async def test_records_of_a_dropped_partition_are_not_taken() -> None:
    queue = PollQueue()
    queue.put([polled(0), polled(1)])
    queue.put([polled(0)])
    queue.drop(Partition("events", 0))
    assert queue.value_bytes == 1
    assert [[records.partition.partition for records in each] for each in await queue.take()] == [[1]]


async def test_bytes_of_waiting_values_are_counted() -> None:
    queue = PollQueue()
    values = [LogRecord(0, None, b"x" * 1000, 0, ()), LogRecord(1, None, None, 0, ())]
    for _ in range(2):
        queue.put([PolledRecords(Partition("events", 0), 1, 0, 0, 0.0, values)])
    assert queue.value_bytes == 2000
    await queue.take()
    assert queue.value_bytes == 0
