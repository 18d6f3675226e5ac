"""Reads of a real topic to its end: empty partitions, transactions, retention, records that arrive meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.errors import TopicAuthorizationFailedError

from tests.kafka.broker import Broker
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SourceError
from worker.kafka.topic_reader import OffsetRange, make_consumer, offset_ranges, read_ranges

# A read that waits for the end of a transaction or for a record that never comes takes the request timeout.
PROMPT_S = 15


@asynccontextmanager
async def consuming(config: KafkaConfig, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = make_consumer(config, topic)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def read(
    consumer: AIOKafkaConsumer, ranges: dict[TopicPartition, OffsetRange], config: KafkaConfig
) -> list[tuple[int, int]]:
    """Return the partition and offset of each record, sorted."""
    async with asyncio.timeout(PROMPT_S):
        polls = [polled async for polled in read_ranges(consumer, ranges, config, WallClock())]
    records = [record for polled in polls for records in polled.values() for record in records]
    return sorted((record.partition, record.offset) for record in records)


async def read_all(broker: Broker, topic: str, **options: int) -> list[tuple[int, int]]:
    config = broker.config(**options)
    async with consuming(config, topic) as consumer:
        return await read(consumer, await offset_ranges(consumer, sorted(consumer.assignment()), config), config)


async def delete_before(broker: Broker, topic: str, offset: int) -> None:
    async with broker.admin() as admin:
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(offset)})


@asynccontextmanager
async def transactional_producer(broker: Broker, topic: str) -> AsyncIterator[AIOKafkaProducer]:
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=f"{topic}-writer") as producer:
        yield producer


async def abort_one(producer: AIOKafkaProducer, topic: str) -> None:
    """Send a record to partition 0 and abort it: it takes two offsets, with its marker."""
    await producer.begin_transaction()
    await producer.send_and_wait(topic, b"never", partition=0)
    await producer.abort_transaction()


async def test_every_record_of_every_partition_is_read_once(broker: Broker):
    topic = await broker.topic(partitions=3)
    await broker.produce(topic, [b"x"] * 50, partition=0)
    await broker.produce(topic, [b"x"] * 20, partition=2)
    expected = [(0, offset) for offset in range(50)] + [(2, offset) for offset in range(20)]
    assert await read_all(broker, topic, max_poll_records=7) == expected


async def test_empty_topic_is_read_at_once(broker: Broker):
    assert await read_all(broker, await broker.topic(partitions=2)) == []


@pytest.mark.parametrize("max_poll_records", [1, 100])
async def test_partition_that_ends_with_control_records_does_not_block(broker: Broker, max_poll_records: int):
    topic = await broker.topic()
    async with transactional_producer(broker, topic) as producer:
        async with producer.transaction():
            await producer.send(topic, b"committed", partition=0)
        await abort_one(producer, topic)
    assert await read_all(broker, topic, max_poll_records=max_poll_records) == [(0, 0)]


async def test_partition_that_has_only_aborted_records_does_not_block(broker: Broker):
    topic = await broker.topic()
    async with transactional_producer(broker, topic) as producer:
        await abort_one(producer, topic)
    assert await read_all(broker, topic) == []


async def test_open_transaction_ends_the_range(broker: Broker):
    topic = await broker.topic()
    await broker.produce(topic, [b"before"] * 2)
    async with transactional_producer(broker, topic) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"pending", partition=0)
        await broker.produce(topic, [b"after"])
        assert await read_all(broker, topic) == [(0, 0), (0, 1)]
        await producer.commit_transaction()
    assert await read_all(broker, topic) == [(0, 0), (0, 1), (0, 2), (0, 3)]


async def test_range_begins_at_the_first_record_that_retention_left(broker: Broker):
    topic = await broker.topic()
    await broker.produce(topic, [b"x"] * 10)
    await delete_before(broker, topic, 6)
    config = broker.config()
    async with consuming(config, topic) as consumer:
        ranges = await offset_ranges(consumer, sorted(consumer.assignment()), config)
        assert ranges == {TopicPartition(topic, 0): OffsetRange(6, 10)}
        assert await read(consumer, ranges, config) == [(0, offset) for offset in range(6, 10)]


async def test_records_that_retention_deletes_before_they_are_read_are_skipped(broker: Broker):
    topic = await broker.topic()
    await broker.produce(topic, [b"x"] * 10)
    config = broker.config()
    async with consuming(config, topic) as consumer:
        ranges = await offset_ranges(consumer, sorted(consumer.assignment()), config)
        await delete_before(broker, topic, 6)
        assert await read(consumer, ranges, config) == [(0, offset) for offset in range(6, 10)]


async def test_range_that_retention_deletes_entirely_does_not_block(broker: Broker):
    topic = await broker.topic()
    await broker.produce(topic, [b"x"] * 10)
    config = broker.config()
    tp = TopicPartition(topic, 0)
    async with consuming(config, topic) as consumer:
        await delete_before(broker, topic, 10)
        assert await read(consumer, {tp: OffsetRange(0, 10)}, config) == []


async def test_part_of_a_range_is_read_and_later_records_are_not_waited_for(broker: Broker):
    topic = await broker.topic()
    await broker.produce(topic, [b"x"] * 10)
    config = broker.config(max_poll_records=1)
    async with consuming(config, topic) as consumer:
        assert await read(consumer, {TopicPartition(topic, 0): OffsetRange(3, 5)}, config) == [(0, 3), (0, 4)]


async def test_records_polled_after_the_end_are_handed_over(broker: Broker):
    """Who follows the topic with the same consumer would miss them otherwise."""
    topic = await broker.topic()
    await broker.produce(topic, [b"x"] * 10)
    config = broker.config()
    tp = TopicPartition(topic, 0)
    async with consuming(config, topic) as consumer:
        offsets = await read(consumer, {tp: OffsetRange(0, 5)}, config)
        assert offsets == [(0, offset) for offset in range(await consumer.position(tp))]


@pytest.mark.parametrize("max_poll_records", [1, 3, 100])
async def test_record_that_cannot_be_decoded_costs_its_batch_alone(broker: Broker, max_poll_records: int, logged):
    topic = await broker.topic(partitions=2)
    await broker.produce(topic, [b"x"] * 3)
    await broker.append_undecodable(topic, [b"x"] * 5, bad=2)
    await broker.append_undecodable(topic, [b"x"] * 2, bad=0)
    await broker.produce(topic, [b"x"] * 2)
    await broker.produce(topic, [b"x"] * 4, partition=1)
    first = [(0, offset) for offset in (0, 1, 2, 3, 4, 10, 11)]
    other = [(1, offset) for offset in range(4)]
    assert await read_all(broker, topic, max_poll_records=max_poll_records) == first + other
    skipped = [(line["partition"], line["offset"], line["next_batch"]) for line in logged() if "offset" in line]
    assert skipped == [(0, 5, 8), (0, 8, 10)]


async def test_refused_read_is_a_source_error(broker: Broker, monkeypatch: pytest.MonkeyPatch):
    """The broker of the tests refuses nobody, so the client raises what it raises for a topic without permission."""
    topic = await broker.topic()
    await broker.produce(topic, [b"x"])
    config = broker.config()

    async def refuse(*partitions: TopicPartition, **options: int) -> None:
        raise TopicAuthorizationFailedError(topic)

    async with consuming(config, topic) as consumer:
        monkeypatch.setattr(consumer, "getmany", refuse)
        with pytest.raises(SourceError, match=f"forbids this client the topic .*{topic}") as caught:
            await read(consumer, {TopicPartition(topic, 0): OffsetRange(0, 1)}, config)
    assert not caught.value.retriable
