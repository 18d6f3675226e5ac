"""Rings restored from a real topic into a real Valkey, as if every committed event had just been read."""

from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete

from pipeline.records import Event
from tests.kafka.broker import Broker
from tests.kafka.rebuilds import NOW_MS, read_rings, rebuild
from tests.oracle import Oracle
from worker.cli import main
from worker.clock import WallClock
from worker.config import Config, KafkaConfig, SequencesConfig
from worker.errors import SourceError
from worker.operations.rebuild import Rebuild, RebuildPlan
from worker.redis.client import RedisClient


async def fill_topic(broker: Broker, count: int, transactional: bool = False) -> Config:
    """Produce `count` records of four users to two partitions; every tenth record is not an event.

    The group has committed all but the last five records of partition 1, or all when transactional.
    """
    topic = await broker.topic(2)
    kafka = broker.config(events_topic=topic)
    options: dict[str, Any] = {"transactional_id": f"{topic}-producer"} if transactional else {}
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, **options) as producer:
        for number in range(count):
            if transactional:
                await producer.begin_transaction()
            await producer.send(topic, record(topic, number), partition=number % 2)
            if transactional:
                await producer.commit_transaction()
    ends = [await end_offset(kafka, partition) for partition in range(2)]
    await commit(kafka, {0: ends[0], 1: ends[1] - (0 if transactional else 5)})
    return Config(kafka=kafka, sequences=SequencesConfig(max_events=8))


def record(topic: str, number: int) -> bytes:
    if number % 10 == 9:
        return b"no event"
    return msgspec.json.encode(Event(f"{topic}.u{number % 4}", f"i{number}", "view", NOW_MS - 1000 + number))


async def end_offset(kafka: KafkaConfig, partition: int) -> int:
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


async def test_rebuilt_rings_equal_the_oracle_up_to_the_committed_offsets(broker: Broker, client: RedisClient):
    config = await fill_topic(broker, 100)
    topic = config.kafka.events_topic
    oracle = Oracle(topic, cap=8)
    for number in range(100):
        if number % 10 != 9 and (number % 2 == 0 or number // 2 < 45):
            oracle.feed(number % 2, number // 2, msgspec.json.decode(record(topic, number)))
    plan, report = await rebuild(config, client)
    assert await read_rings(client, topic) == oracle.rings()
    assert (report.offsets, plan.offsets, report.users) == (100, 100, 4)
    assert (report.events + report.unreadable, report.restored, report.rewritten) == (100, 86, 0)
    _, again = await rebuild(config, client)
    assert (again.restored, again.rewritten) == (0, 0)
    assert await read_rings(client, topic) == oracle.rings()


async def test_transaction_markers_are_skipped_and_do_not_block(broker: Broker, client: RedisClient):
    config = await fill_topic(broker, 6, transactional=True)
    plan, report = await rebuild(config, client)
    assert (report.events, report.offsets, plan.offsets) == (6, 12, 12)


async def test_retention_during_a_rebuild_costs_only_the_deleted_records(broker: Broker, client: RedisClient):
    config = await fill_topic(broker, 40)

    class RebuildAfterRetention(Rebuild):
        async def _plan(self, *args) -> RebuildPlan:
            plan = await super()._plan(*args)
            async with broker.admin() as admin:
                await admin.delete_records(dict.fromkeys(plan.ranges, RecordsToDelete(5)))
            return plan

    plan, report = await RebuildAfterRetention(config, client, WallClock()).run(False, lambda report, total: None)
    assert plan.offsets == 40
    assert report.events + report.unreadable == 30
    assert report.lost == 10


async def test_group_with_members_is_rebuilt_only_by_force(broker: Broker, client: RedisClient):
    config = await fill_topic(broker, 10)
    kafka = config.kafka
    member = AIOKafkaConsumer(kafka.events_topic, bootstrap_servers=kafka.bootstrap_servers, group_id=kafka.group_id)
    async with member:
        with pytest.raises(SourceError, match=r"has members .*\(1\); stop the workers, then run rebuild again"):
            await rebuild(config, client)
        assert await read_rings(client, kafka.events_topic) == {}
        _, report = await rebuild(config, client, force=True)
        assert report.events


async def test_missing_topic_is_reported(broker: Broker, client: RedisClient):
    config = Config(kafka=broker.config(events_topic="no.such.topic"))
    with pytest.raises(SourceError, match="nothing to rebuild from"):
        await rebuild(config, client)


def test_rebuild_command_prints_what_it_restored(run, broker: Broker, valkey: str, monkeypatch, capsys):
    config = run(fill_topic(broker, 20))
    for name, value in {
        "REDIS__URL": valkey,
        "KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap,
        "KAFKA__EVENTS_TOPIC": config.kafka.events_topic,
        "KAFKA__GROUP_ID": config.kafka.group_id,
    }.items():
        monkeypatch.setenv(f"MILLRACE__{name}", value)
    assert main(["rebuild"]) == 0
    assert (
        "14 events restored: 18 of 4 users in 2 partitions read, 0 rings with gaps rewritten" in capsys.readouterr().out
    )


async def test_records_that_cannot_be_decoded_are_skipped_and_counted(broker: Broker, client: RedisClient):
    topic = await broker.topic(1)
    config = Config(kafka=broker.config(events_topic=topic))
    values = [record(topic, number) for number in range(8)]
    await broker.produce(topic, values[:3])
    await broker.append_undecodable(topic, values[3:6], bad=1)
    await broker.produce(topic, values[6:])
    await commit(config.kafka, {0: 8})
    _, report = await rebuild(config, client)
    assert (report.events, report.corrupt, report.lost) == (6, 2, 0)
    oracle = Oracle(topic, config.sequences.max_events)
    for number in (0, 1, 2, 3, 6, 7):
        oracle.feed(0, number, msgspec.json.decode(values[number]))
    assert await read_rings(client, topic) == oracle.rings()
