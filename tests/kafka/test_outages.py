"""A broker that hangs and one that is killed and restarted, under a source and a sink."""

import asyncio

import pytest

from pipeline.records import Slate
from tests.kafka.broker import BreakableKafka, Broker, RecordingListener
from tests.kafka.slates import MemoryStore, make_slate, sink_config
from tests.kafka.sources import joined, poll_records, values
from worker.errors import SinkUnavailable
from worker.interfaces import Partition
from worker.kafka.sink import KafkaSink


async def send_until_acknowledged(sink: KafkaSink, slates: list[Slate]) -> None:
    while True:
        try:
            return await sink.send(slates)
        except SinkUnavailable:
            await asyncio.sleep(0.1)


async def test_hung_broker_is_reported_and_then_gets_every_slate_once(
    breakable_kafka: BreakableKafka, breakable_broker: Broker
):
    config = await sink_config(breakable_broker, request_timeout_ms=1500)
    slates = [make_slate(f"user-{number}") for number in range(50)]
    async with KafkaSink(config, MemoryStore()) as sink:
        await send_until_acknowledged(sink, [make_slate("first")])
        breakable_kafka.suspend()
        with pytest.raises(SinkUnavailable, match="acknowledged nothing"):
            await sink.send(slates)
        breakable_kafka.resume()
        await send_until_acknowledged(sink, slates)
        await send_until_acknowledged(sink, [make_slate("last")])
    assert len(await breakable_broker.read(config.kafka.recommendations_topic, 52)) == 52


async def test_restart_of_a_killed_broker_loses_neither_slates_nor_commits(
    breakable_kafka: BreakableKafka, breakable_broker: Broker, listener: RecordingListener
):
    topic = await breakable_broker.topic()
    source_config = breakable_broker.config(events_topic=topic, session_timeout_ms=30000)
    config = await sink_config(breakable_broker, request_timeout_ms=1500)
    slates = [make_slate(f"user-{number}") for number in range(50)]
    await breakable_broker.produce(topic, [b"event"] * 10)
    async with joined(source_config, listener) as source, KafkaSink(config, MemoryStore()) as sink:
        await send_until_acknowledged(sink, [make_slate("first")])
        assert values(await poll_records(source, 10)) == [b"event"] * 10
        await asyncio.to_thread(breakable_kafka.kill)
        committing = asyncio.create_task(source.commit({Partition(topic, 0): 10}, listener.assignments))
        assert await source.poll(0.2) == []
        with pytest.raises(SinkUnavailable):
            await sink.send(slates[:20])
        await asyncio.to_thread(breakable_kafka.start)
        await committing
        assert await breakable_broker.committed(topic, source_config.group_id) == 10
        await breakable_broker.produce(topic, [b"after"])
        assert values(await poll_records(source, 1)) == [b"after"]
        await send_until_acknowledged(sink, slates[20:])
        await send_until_acknowledged(sink, [make_slate("last")])
    records = await breakable_broker.read(config.kafka.recommendations_topic, 52)
    assert len(records) == 52  # the 20 given up were delivered, too
