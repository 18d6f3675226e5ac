"""Read partitions from one offset to another, without a consumer group."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition, errors

from worker import logging
from worker.config import KafkaConfig
from worker.errors import SourceUnavailable
from worker.interfaces import Clock
from worker.kafka.client import client_options, source_error
from worker.kafka.corrupt_record import CorruptRecord, read_before

log = logging.get("kafka")
POLL_MS = 500
Records = dict[TopicPartition, list[ConsumerRecord]]
OnCorrupt = Callable[[CorruptRecord, Exception], None]


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


def log_corrupt(corrupt: CorruptRecord, error: Exception) -> None:
    """Log a record that cannot be decoded and is skipped, with the rest of its batch."""
    log.error(
        "record cannot be decoded: skipping it and the rest of its batch",
        topic=corrupt.tp.topic,
        partition=corrupt.tp.partition,
        offset=corrupt.offset,
        next_batch=corrupt.next_batch,
        error=str(error),
    )


async def offset_ranges(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], config: KafkaConfig
) -> dict[TopicPartition, OffsetRange]:
    """Return the offsets that can be read now: an open transaction ends its partition's range.

    Raises SourceError, SourceUnavailable.
    """
    begins = await begin_offsets(consumer, partitions, config)
    with _source_errors(config, partitions):
        ends = await consumer.end_offsets(partitions)
    return {each: OffsetRange(begins[each], ends[each]) for each in partitions}


async def begin_offsets(
    consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], config: KafkaConfig
) -> dict[TopicPartition, int]:
    """Return the earliest offsets that are left. Raises SourceError, SourceUnavailable."""
    with _source_errors(config, partitions):
        return await consumer.beginning_offsets(partitions)


async def positions_of(
    consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition], config: KafkaConfig
) -> dict[TopicPartition, int]:
    """Return the next offset of each of these assigned partitions, waiting for one that is being reset.

    Raises SourceError, SourceUnavailable.
    """
    try:
        with _source_errors(config, partitions):
            async with asyncio.timeout(config.request_timeout_ms / 1000):
                return {each: await consumer.position(each) for each in partitions}
    except TimeoutError as error:
        raise _no_answer(config, partitions) from error


async def poll(
    consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int], config: KafkaConfig, on_corrupt: OnCorrupt
) -> Records:
    """Return new records of these partitions, by partition; none when there are none within POLL_MS.

    A record that cannot be decoded is passed to `on_corrupt` and skipped, together with the rest of its batch.
    Raises SourceError, SourceUnavailable.

    positions: the next offset of each partition
    """
    with _source_errors(config, positions):
        try:
            return await consumer.getmany(*positions, timeout_ms=POLL_MS, max_records=config.max_poll_records)
        except Exception as error:
            if (corrupt := CorruptRecord.find(error)) is None:
                raise
            for partition, offset in positions.items():  # what this call had read of other partitions is lost
                consumer.seek(partition, offset)
            try:
                records = await read_before(consumer, corrupt, config.request_timeout_ms / 1000)
            except TimeoutError as late:
                raise _no_answer(config, [corrupt.tp]) from late
            consumer.seek(corrupt.tp, corrupt.next_batch)
            on_corrupt(corrupt, error)
            return {corrupt.tp: records}


async def read_ranges(
    consumer: AIOKafkaConsumer,
    ranges: Mapping[TopicPartition, OffsetRange],
    config: KafkaConfig,
    clock: Clock,
    on_corrupt: OnCorrupt = log_corrupt,
) -> AsyncIterator[Records]:
    """Yield the records of assigned partitions, poll by poll, until each has been read to its range's end.

    A finished partition is no longer polled; its last poll may return records after the end. A poll may be empty:
    transaction markers and aborted records have offsets, too. `poll` says what happens to a corrupt record. Raises
    SourceUnavailable when no position moves for `request_timeout_ms`; the caller's own time does not count.
    SourceError when Kafka refuses the read.
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
        yield await poll(consumer, unread, config, on_corrupt)


async def _unread_positions(
    consumer: AIOKafkaConsumer, ranges: Mapping[TopicPartition, OffsetRange], config: KafkaConfig
) -> dict[TopicPartition, int]:
    """Return the next offsets of the partitions that are not finished."""
    positions = await positions_of(consumer, ranges, config)
    return {each: position for each, position in positions.items() if position < ranges[each].end}


@contextmanager
def _source_errors(config: KafkaConfig, partitions: Iterable[TopicPartition]) -> Iterator[None]:
    try:
        yield
    except errors.KafkaError as error:
        raise source_error(config, ", ".join(_topics(partitions)), error) from error


def _no_answer(config: KafkaConfig, partitions: Iterable[TopicPartition]) -> SourceUnavailable:
    topics = ", ".join(_topics(partitions))
    return SourceUnavailable(
        f"kafka {config.bootstrap_servers} stopped answering: no progress in topic {topics} for "
        f"{config.request_timeout_ms} ms; check the broker, then start again"
    )


def _topics(partitions: Iterable[TopicPartition]) -> list[str]:
    return sorted({partition.topic for partition in partitions})
