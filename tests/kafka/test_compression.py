"""Events that producers or the topic compress are answered as any other."""

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from tests.kafka.broker import Broker
from tests.kafka.workers import running
from worker.config import Config, EventsConfig, RedisConfig

CODECS = ("gzip", "snappy", "lz4", "zstd")


def events(codec: str) -> list[bytes]:
    return [
        msgspec.json.encode({"user_id": f"{codec}-{number}", "item_id": f"i{number}", "action": "view", "ts_ms": 1})
        for number in range(5)
    ]


async def produce(broker: Broker, topic: str, codec: str | None, values: list[bytes]) -> None:
    """Send all events in one batch."""
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, compression_type=codec, linger_ms=50) as producer:
        for acknowledgement in [await producer.send(topic, value, partition=0) for value in values]:
            await acknowledgement


async def worker_config(broker: Broker, valkey: str, events_topic: str) -> Config:
    kafka = broker.config(
        events_topic=events_topic,
        recommendations_topic=await broker.topic(kind="slates"),
        dead_letter_topic=await broker.topic(kind="dead"),
        items_topic=broker.name("items"),
    )
    return Config(kafka=kafka, redis=RedisConfig(url=valkey), events=EventsConfig(max_age_days=0))


async def answered_users(broker: Broker, config: Config, count: int) -> set[str]:
    async with running(config):
        slates = await broker.read(config.kafka.recommendations_topic, count)
    return {record.key.decode() for record in slates}


async def test_batches_of_every_codec_become_slates(broker: Broker, valkey: str) -> None:
    topic = await broker.topic()
    for codec in CODECS:
        await produce(broker, topic, codec, events(codec))
    config = await worker_config(broker, valkey, topic)
    users = {f"{codec}-{number}" for codec in CODECS for number in range(5)}
    assert await answered_users(broker, config, len(users)) == users


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
async def test_topic_that_compresses_becomes_slates(codec: str, broker: Broker, valkey: str) -> None:
    topic = await broker.topic(settings={"compression.type": codec})
    await produce(broker, topic, None, events("topic"))
    config = await worker_config(broker, valkey, topic)
    assert await answered_users(broker, config, 5) == {f"topic-{number}" for number in range(5)}
