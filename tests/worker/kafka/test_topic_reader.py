"""When a read of a topic gives up: no position moves for the request timeout. The consumer is a script."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from aiokafka import TopicPartition

from worker.clock import VirtualClock
from worker.config import KafkaConfig
from worker.errors import SourceUnavailable
from worker.kafka.topic_reader import OffsetRange, read_ranges

TP = TopicPartition("items", 0)
TIMEOUT_S = 30
CONFIG = KafkaConfig(request_timeout_ms=1000 * TIMEOUT_S)


class ScriptedConsumer:
    """Each poll takes some seconds and moves the position by some offsets: (seconds, offsets) per poll.

    A poll of two offsets or more returns one record, a poll of one offset a transaction marker, which is no record.
    """

    def __init__(self, *polls: tuple[float, int]) -> None:
        self.polls = list(polls)
        self.now_s = 0.0
        self.offset = 0

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.offset = offset

    async def position(self, partition: TopicPartition) -> int:
        return self.offset

    async def getmany(self, *partitions: TopicPartition, **options: int) -> dict[TopicPartition, list[str]]:
        seconds, offsets = self.polls.pop(0)
        self.now_s += seconds
        self.offset += offsets
        return {TP: ["record"]} if offsets > 1 else {}


class HangingConsumer(ScriptedConsumer):
    """Resets its position for ever."""

    async def position(self, partition: TopicPartition) -> int:
        return await asyncio.Future()


def reading(consumer: ScriptedConsumer, end: int, config: KafkaConfig = CONFIG) -> AsyncIterator[dict[Any, Sequence]]:
    clock = VirtualClock(monotonic=lambda: consumer.now_s)
    return read_ranges(cast(Any, consumer), {TP: OffsetRange(0, end)}, config, clock)


async def test_reading_stops_at_the_end_of_the_range():
    consumer = ScriptedConsumer((1, 2), (1, 2), (1, 2))
    assert [polled async for polled in reading(consumer, 3)] == [{TP: ["record"]}] * 2
    assert consumer.polls == [(1, 2)]


async def test_empty_range_needs_no_poll():
    assert [polled async for polled in reading(ScriptedConsumer(), 0)] == []


async def test_reading_gives_up_when_no_position_moves_for_the_request_timeout():
    consumer = ScriptedConsumer((1, 2), (TIMEOUT_S - 1, 0), (1, 0), (1, 0))
    with pytest.raises(SourceUnavailable, match=r"no progress in topic items for 30000 ms"):
        [polled async for polled in reading(consumer, 9)]
    assert consumer.polls == [(1, 0)]


async def test_markers_without_records_are_progress():
    polls = [(TIMEOUT_S - 1, 0), (1, 1)] * 3
    assert [polled async for polled in reading(ScriptedConsumer(*polls), 3)] == [{}] * 6


async def test_time_between_polls_is_not_the_brokers():
    consumer = ScriptedConsumer((0, 2), (1, 0), (1, 2))
    count = 0
    async for polled in reading(consumer, 4):
        count += len(polled)
        consumer.now_s += 10 * TIMEOUT_S if polled else 0
    assert count == 2


async def test_position_that_stays_unknown_is_given_up():
    with pytest.raises(SourceUnavailable, match="stopped answering"):
        [polled async for polled in reading(HangingConsumer(), 1, KafkaConfig(request_timeout_ms=1))]
