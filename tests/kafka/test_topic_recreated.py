"""Topics that are deleted and created again under a worker, before its start and between two starts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata
from msgspec.structs import replace

from pipeline.records import EVENT_BYTES, Event
from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.rebuilds import NOW_MS, rebuild
from tests.kafka.sources import poll_records, values
from worker.clock import WallClock
from worker.config import Config, SequencesConfig
from worker.errors import TopicRecreated
from worker.interfaces import Partition
from worker.kafka.source import KafkaSource
from worker.kafka.topic_id import read_topic_id
from worker.redis.client import RedisClient
from worker.redis.rings.sequences import SequenceStore
from worker.stream.codec import Codec

IGNORED = "ignored"  # a commit's metadata from before ids were committed, or by another program


@pytest.fixture
async def config(broker: Broker) -> Config:
    return Config(kafka=broker.config(events_topic=await broker.topic()))


def events(config: Config, start: int, stop: int) -> list[bytes]:
    user = config.kafka.events_topic
    return [msgspec.json.encode(Event(user, f"i{n}", "view", NOW_MS - 1000 + n)) for n in range(start, stop)]


@asynccontextmanager
async def started(config: Config, client: RedisClient, listener: RecordingListener) -> AsyncIterator[KafkaSource]:
    source = KafkaSource(config.kafka, WallClock(), SequenceStore(client, config.sequences).claim_topic)
    await source.start(listener)
    try:
        yield source
    finally:
        await source.stop()


async def consume(config: Config, client: RedisClient, count: int) -> None:
    """Push `count` events and commit them."""
    listener = RecordingListener()
    async with started(config, client, listener) as source:
        polled = await poll_records(source, count)
        consumed, _ = Codec(config, WallClock()).decode_all(polled)
        await SequenceStore(client, config.sequences).push(consumed)
        ends = {part.partition: part.records[-1].offset + 1 for part in polled}
        await source.commit(ends, listener.assignments)


async def ring_length(config: Config, client: RedisClient) -> int:
    return (await client.call("STRLEN", client.keys.ring(config.kafka.events_topic)) - 40) // EVENT_BYTES


async def test_topic_that_is_created_again_has_another_id(broker: Broker, config: Config):
    topic = config.kafka.events_topic
    before = await read_topic_id(config.kafka, WallClock(), topic)
    assert await read_topic_id(config.kafka, WallClock(), topic) == before
    await broker.recreate(topic)
    after = await read_topic_id(config.kafka, WallClock(), topic)
    assert before is not None
    assert after is not None
    assert len(before) == len(after) == 22
    assert before != after
    assert await read_topic_id(config.kafka, WallClock(), "no.such.topic") is None


@pytest.mark.parametrize("count", [1, 3])
async def test_worker_refuses_a_topic_that_was_created_again_until_the_generation_is_changed(
    broker: Broker, client: RedisClient, listener: RecordingListener, config: Config, count: int
):
    topic = config.kafka.events_topic
    await broker.produce(topic, events(config, 0, 1))
    await consume(config, client, 1)
    await broker.recreate(topic)
    await broker.produce(topic, events(config, 1, 1 + count))
    with pytest.raises(TopicRecreated, match=r"set sequences.topic_generation, now '1'") as caught:
        async with started(config, client, listener):
            pass
    assert caught.value.exit_code == 8
    assert listener.history == []
    with pytest.raises(TopicRecreated, match=r"set sequences.topic_generation"):
        await rebuild(config, client)
    changed = replace(config, sequences=SequencesConfig(topic_generation="2"))
    await consume(changed, client, count)
    assert await ring_length(config, client) == 1 + count


async def poll_and_commit(source: KafkaSource) -> None:
    while True:
        polled = await source.poll(0.1)
        ends = {part.partition: part.records[-1].offset + 1 for part in polled}
        await source.commit(ends, {part.partition: part.assignment for part in polled})


@pytest.mark.parametrize("count", [1, 5, 10])
async def test_running_worker_halts_when_its_topic_is_created_again(
    broker: Broker, client: RedisClient, listener: RecordingListener, config: Config, count: int
):
    """The new topic has fewer records than the worker has read, as many, or more."""
    topic = config.kafka.events_topic
    await broker.produce(topic, events(config, 0, 5))
    async with started(config, client, listener) as source:
        await poll_records(source, 5)
        await source.commit({Partition(topic, 0): 5}, listener.assignments)
        await broker.recreate(topic)
        await broker.produce(topic, events(config, 5, 5 + count))
        polling = asyncio.create_task(poll_and_commit(source))
        await broker.produce(topic, events(config, 15, 20))
        with pytest.raises(TopicRecreated, match=r"but this process read id .*: the topic was deleted"):
            await polling
    assert await broker.committed(topic, config.kafka.group_id) is None


async def commit_with(config: Config, offset: int, metadata: str) -> None:
    kafka = config.kafka
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group_id, enable_auto_commit=False
    ) as consumer:
        tp = TopicPartition(kafka.events_topic, 0)
        consumer.assign([tp])
        await consumer.commit({tp: OffsetAndMetadata(offset, metadata)})


async def test_commit_of_a_deleted_topic_is_not_used(
    broker: Broker,
    client: RedisClient,
    listener: RecordingListener,
    config: Config,
    logged: Callable[[], list[dict[str, Any]]],
):
    values_produced = events(config, 0, 10)
    await broker.produce(config.kafka.events_topic, values_produced)
    await commit_with(config, 4, "topic-id=AAAAAAAAAAAAAAAAAAAAAQ")
    async with started(config, client, listener) as source:
        assert values(await poll_records(source, 10)) == values_produced
    assert any("of a topic that was deleted" in str(line) for line in logged())


@pytest.mark.parametrize("metadata", ["", IGNORED])
async def test_first_commit_stores_the_topic_id(
    broker: Broker, client: RedisClient, listener: RecordingListener, config: Config, metadata: str
):
    topic = config.kafka.events_topic
    await broker.produce(topic, events(config, 0, 10))
    await commit_with(config, 4, metadata)
    async with started(config, client, listener) as source:
        assert values(await poll_records(source, 6)) == events(config, 4, 10)
        await source.commit({Partition(topic, 0): 7}, listener.assignments)
    topic_id = await read_topic_id(config.kafka, WallClock(), topic)
    async with broker.admin() as admin:
        committed = await admin.list_consumer_group_offsets(config.kafka.group_id)
    assert committed[TopicPartition(topic, 0)] == OffsetAndMetadata(7, f"topic-id={topic_id}")
