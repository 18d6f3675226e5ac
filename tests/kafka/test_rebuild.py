"""Rings restored from a real topic into a real Valkey: as if every committed event had just been read."""

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from pipeline.records import Event
from tests.kafka.broker import Broker
from tests.oracle import Oracle
from worker.cli import main
from worker.clock import WallClock
from worker.config import Config, KafkaConfig, RedisConfig, SequencesConfig
from worker.errors import SourceError
from worker.operations.rebuild import Rebuild, RebuildPlan, RebuildReport
from worker.redis.client import RedisClient, connect

NOW_MS = WallClock().now_ms()


async def events_topic(broker: Broker, count: int, transactional: bool = False) -> Config:
    """`count` events of four users on two partitions, one record in ten no event; the group has read all but five."""
    topic = await broker.topic(2)
    kafka = broker.config(events_topic=topic)
    options = {"transactional_id": f"{topic}-producer"} if transactional else {}
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, **options) as producer:
        for number in range(count):
            if transactional:
                await producer.begin_transaction()
            await producer.send(topic, record(topic, number), partition=number % 2)
            if transactional:
                await producer.commit_transaction()
    await commit(kafka, {0: await end(kafka, 0), 1: await end(kafka, 1) - (0 if transactional else 5)})
    return Config(kafka=kafka, redis=RedisConfig(), sequences=SequencesConfig(max_events=8))


def record(topic: str, number: int) -> bytes:
    if number % 10 == 9:
        return b"no event"
    return msgspec.json.encode(Event(f"{topic}.u{number % 4}", f"i{number}", "view", NOW_MS - 1000 + number))


async def end(kafka: KafkaConfig, partition: int) -> int:
    async with AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers) as consumer:
        tp = TopicPartition(kafka.events_topic, partition)
        return (await consumer.end_offsets([tp]))[tp]


async def commit(kafka: KafkaConfig, offsets: dict[int, int]) -> None:
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group_id, enable_auto_commit=False
    ) as consumer:
        tps = {TopicPartition(kafka.events_topic, partition): offset for partition, offset in offsets.items()}
        consumer.assign(list(tps))
        await consumer.commit(tps)


async def rebuilt(config: Config, client: RedisClient, force: bool = False) -> tuple[RebuildPlan, RebuildReport]:
    return await Rebuild(config, client, WallClock()).run(force, lambda report, total: None)


async def rings(client: RedisClient, topic: str) -> dict[str, bytes]:
    keys = [f"seq:{{u:{topic}.u{number}}}" for number in range(4)]
    values = await client.pipeline([("GET", key) for key in keys])
    return {key: value for key, value in zip(keys, values, strict=True) if value}


def test_rings_equal_the_oracles_after_redis_lost_them_and_what_is_not_committed_is_left_to_the_worker(
    run, broker, valkey
):
    async def scenario() -> None:
        config = await events_topic(broker, 100)
        topic, oracle = config.kafka.events_topic, Oracle(config.kafka.events_topic, cap=8)
        for number in range(100):
            if number % 10 != 9 and (number % 2 == 0 or number // 2 < 45):
                oracle.feed(number % 2, number // 2, msgspec.json.decode(record(topic, number)))
        client = await connect(RedisConfig(url=valkey))
        await client.call("SET", f"seq:{{u:{topic}.u1}}", b"\x01\x18" + bytes(38) + b"stale" * 24)
        plan, report = await rebuilt(config, client)
        assert await rings(client, topic) == oracle.rings()
        assert (report.offsets, plan.offsets, len(report.users)) == (95, 95, 4)
        assert report.events + report.unreadable == 95
        assert await rebuilt(config, client) == (plan, report)
        assert await rings(client, topic) == oracle.rings()
        await client.aclose()

    run(scenario())


def test_transaction_markers_are_no_events_and_do_not_hold_it_up(run, broker, valkey):
    async def scenario() -> None:
        config = await events_topic(broker, 6, transactional=True)
        client = await connect(RedisConfig(url=valkey))
        plan, report = await rebuilt(config, client)
        assert (report.events, report.offsets, plan.offsets) == (6, 12, 12)
        await client.aclose()

    run(scenario())


def test_a_group_with_members_is_not_rebuilt_under_unless_forced(run, broker, valkey):
    async def scenario() -> None:
        config = await events_topic(broker, 10)
        client = await connect(RedisConfig(url=valkey))
        kafka = config.kafka
        member = AIOKafkaConsumer(
            kafka.events_topic, bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group_id
        )
        async with member:
            with pytest.raises(SourceError, match=r"has members .*\(1\); stop them first"):
                await rebuilt(config, client)
            assert await rings(client, kafka.events_topic) == {}
            _, report = await rebuilt(config, client, force=True)
            assert report.events
        await client.aclose()

    run(scenario())


def test_a_topic_that_is_not_there_is_said_so(run, broker, valkey):
    async def scenario() -> None:
        client = await connect(RedisConfig(url=valkey))
        with pytest.raises(SourceError, match="nothing to rebuild from"):
            await rebuilt(Config(kafka=broker.config(events_topic="no.such.topic")), client)
        await client.aclose()

    run(scenario())


def test_the_command_rebuilds_and_says_what_it_did(run, broker, valkey, monkeypatch, capsys):
    config = run(events_topic(broker, 20))
    for name, value in {
        "REDIS__URL": valkey,
        "KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
        "KAFKA__EVENTS_TOPIC": config.kafka.events_topic,
        "KAFKA__GROUP_ID": config.kafka.group_id,
    }.items():
        monkeypatch.setenv(f"MILLRACE__{name}", value)
    assert main(["rebuild"]) == 0
    assert "4 rings from 14 events of 2 partitions" in capsys.readouterr().out
