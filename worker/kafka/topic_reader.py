"""Read partitions from one offset to another, without a consumer group."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition, errors

from worker.config import KafkaConfig
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Clock
from worker.kafka.client import client_options
from worker.kafka.error_causes import explain, is_permanent

POLL_MS = 500


class OffsetRange(NamedTuple):
    """The offsets of a partition from `begin` up to but not including `end`."""

    begin: int
    end: int


def make_consumer(config: KafkaConfig, *topics: str) -> AIOKafkaConsumer:
    """Return a consumer, not yet started, that reads committed records and belongs to no group.

    If a partition no longer has the next offset, it continues from the earliest one that is left.

    topics: assigned at its start, with all their partitions
    """
    return AIOKafkaConsumer(
        *topics,
        **client_options(config),
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )


async def offset_ranges(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, OffsetRange]:
    """Return the offsets that can be read now: an open transaction ends its partition's range."""
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    return {each: OffsetRange(begins[each], ends[each]) for each in partitions}


async def read_ranges(
    consumer: AIOKafkaConsumer, ranges: Mapping[TopicPartition, OffsetRange], config: KafkaConfig, clock: Clock
) -> AsyncIterator[dict[TopicPartition, list[ConsumerRecord]]]:
    """Yield the records of assigned partitions, poll by poll, until each has been read to its range's end.

    A finished partition is no longer polled; its last poll may return records after the end. A poll may be empty:
    transaction markers and aborted records have offsets, too. Raises SourceUnavailable when no position moves for
    `request_timeout_ms`; the caller's own time does not count. Raises SourceError when a read is refused.
    """
    for partition, offsets in ranges.items():
        consumer.seek(partition, offsets.begin)
    unread: dict[TopicPartition, int] = {}
    moved_s = clock.monotonic()
    while positions := await _unread_positions(consumer, ranges, config):
        if positions != unread:
            unread = positions
            moved_s = clock.monotonic()
        elif clock.monotonic() - moved_s >= config.request_timeout_ms / 1000:
            raise _no_answer(config, ranges)
        yield await _poll(consumer, unread, config)


async def _poll(
    consumer: AIOKafkaConsumer, partitions: Collection[TopicPartition], config: KafkaConfig
) -> dict[TopicPartition, list[ConsumerRecord]]:
    try:
        return await consumer.getmany(*partitions, timeout_ms=POLL_MS, max_records=config.max_poll_records)
    except errors.KafkaError as error:
        if error.retriable and not is_permanent(error):
            raise
        raise SourceError(explain(config, error, next(iter(partitions)).topic)) from error


async def _unread_positions(
    consumer: AIOKafkaConsumer, ranges: Mapping[TopicPartition, OffsetRange], config: KafkaConfig
) -> dict[TopicPartition, int]:
    """Return the next offsets of the partitions that are not finished. A position that is being reset is waited for."""
    try:
        async with asyncio.timeout(config.request_timeout_ms / 1000):
            positions = {each: await consumer.position(each) for each in ranges}
    except TimeoutError as error:
        raise _no_answer(config, ranges) from error
    return {each: position for each, position in positions.items() if position < ranges[each].end}


def _no_answer(config: KafkaConfig, partitions: Iterable[TopicPartition]) -> SourceUnavailable:
    topics = ", ".join(sorted({partition.topic for partition in partitions}))
    return SourceUnavailable(
        f"kafka {config.bootstrap_servers} stopped answering: no progress in topic {topics} for "
        f"{config.request_timeout_ms} ms; check the broker, then start again"
    )
