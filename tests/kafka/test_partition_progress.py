"""What a source tells of its partitions: one that stands still, one that is added, a topic that is deleted."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewPartitions

from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.sources import joined, poll_records, values
from worker.config import KafkaConfig
from worker.interfaces import Partition
from worker.kafka import source as source_module
from worker.kafka.source import KafkaSource


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for the partitions' ends more often than a worker does."""
    monkeypatch.setattr(source_module, "ASK_ENDS_S", 0.05)


async def polling(source: KafkaSource) -> AsyncIterator[None]:
    """Poll once per step."""
    while True:
        await source.poll(0.05)
        yield


async def test_partition_whose_fetch_hangs_is_told_from_one_that_is_read(
    broker: Broker, listener: RecordingListener
) -> None:
    topic = await broker.topic(partitions=2)
    hung, read = Partition(topic, 0), Partition(topic, 1)
    async with asyncio.timeout(60), joined(broker.config(events_topic=topic), listener) as source:
        source._member.consumer.pause(TopicPartition(*hung))  # nothing of it is fetched any more
        for partition in (hung, read):
            await broker.produce(topic, [b"x"] * 3, partition.partition)
        async for _ in polling(source):
            if source.stalled_s().get(hung, 0) > 0.5:
                break
        assert source.lag() == {hung: 3, read: 0}
        assert source.stalled_s()[read] == 0
        source._member.consumer.resume(TopicPartition(*hung))
        async for _ in polling(source):
            if source.stalled_s()[hung] == 0:
                break


async def test_paused_source_does_not_stand_still(broker: Broker, listener: RecordingListener) -> None:
    topic = await broker.topic()
    async with asyncio.timeout(60), joined(broker.config(events_topic=topic), listener) as source:
        await broker.produce(topic, [b"x"])
        await poll_records(source, 1)
        source.pause()
        await broker.produce(topic, [b"x"])
        async for _ in polling(source):
            if source.lag()[Partition(topic, 0)]:
                break
        for _ in range(5):
            await source.poll(0.05)
        assert source.stalled_s()[Partition(topic, 0)] < 0.2


async def test_partition_that_is_added_is_read_from_its_beginning(broker: Broker, listener: RecordingListener) -> None:
    topic = await broker.topic()
    config: KafkaConfig = msgspec.structs.replace(broker.config(events_topic=topic), metadata_max_age_ms=500)
    async with asyncio.timeout(60), joined(config, listener) as source:
        async with broker.admin() as admin:
            await admin.create_partitions({topic: NewPartitions(2)})
        await broker.produce(topic, [b"new"], 1)
        assert values(await poll_records(source, 1)) == [b"new"]


async def test_deleted_topic_is_named(broker: Broker, listener: RecordingListener) -> None:
    topic = await broker.topic()
    async with asyncio.timeout(60), joined(broker.config(events_topic=topic), listener) as source:
        assert source.problem() == ""
        async with broker.admin() as admin:
            await admin.delete_topics([topic])
        async for _ in polling(source):
            if source.problem():
                break
        assert topic in source.problem()
        assert "deleted" in source.problem()
