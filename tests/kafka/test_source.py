"""KafkaSource on a real broker: polls, commits, rebalances, pauses, transactions, records it cannot decode."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.admin import RecordsToDelete
from prometheus_client import REGISTRY

from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.sources import joined, poll_records, values
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Partition, PolledRecords
from worker.kafka.consumer_group import GroupMember
from worker.kafka.source import KafkaSource
from worker.replay.child_process import free_ports


def numbers(start: int, stop: int) -> list[bytes]:
    return [b"%d" % number for number in range(start, stop)]


def wait_for(event: asyncio.Event) -> Callable[[list[Partition]], Awaitable[object]]:
    """Return an `on_revoked` callback that blocks until the event is set."""
    return lambda partitions: event.wait()


async def test_records_arrive_in_order_with_assignment_and_end_offset(broker: Broker, listener: RecordingListener):
    topic = await broker.topic()
    await broker.produce(topic, numbers(0, 300))
    async with joined(broker.config(events_topic=topic, max_poll_records=100), listener) as source:
        polled = await poll_records(source, 300)
        assert values(polled) == numbers(0, 300)
        assert max(len(part.records) for part in polled) <= 100
        assert {part.assignment for part in polled} == set(listener.assignments.values())
        assert {part.end_offset for part in polled} == {300}
        assert source.lag() == {Partition(topic, 0): 0}


async def test_restart_continues_after_the_committed_offset(broker: Broker, listener: RecordingListener):
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    await broker.produce(topic, numbers(0, 10))
    async with joined(config, listener) as source:
        await poll_records(source, 10)
        await source.commit({Partition(topic, 0): 7}, listener.assignments)
    async with joined(config, listener) as source:
        assert values(await poll_records(source, 3)) == numbers(7, 10)


async def test_commit_of_another_assignment_is_skipped(broker: Broker, listener: RecordingListener):
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    await broker.produce(topic, numbers(0, 10))
    async with joined(config, listener) as source:
        await source.commit({Partition(topic, 0): 5}, listener.assignments)
        await source.commit({Partition(topic, 0): 3}, {Partition(topic, 0): -1})
    assert await broker.committed(topic, config.group_id) == 5


async def test_member_forgotten_by_the_group_cannot_move_offsets_back(broker: Broker):
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    release = asyncio.Event()
    listener = RecordingListener(wait_for(release))
    async with joined(config, listener) as source:
        await source.commit({Partition(topic, 0): 5}, listener.assignments)
        # The group is empty now, as after a missed session: the broker accepts commits without a generation.
        await source._member._coordinator._maybe_leave_group()
        await source.commit({Partition(topic, 0): 3}, listener.assignments)
        assert await broker.committed(topic, config.group_id) == 5
        release.set()


async def test_members_share_the_partitions_and_hand_over_completed_offsets(broker: Broker, eventually):
    topic = await broker.topic(partitions=4)
    config = broker.config(events_topic=topic)
    for partition in range(4):
        await broker.produce(topic, numbers(10 * partition, 10 * partition + 10), partition)

    first_listener = RecordingListener()
    second_listener = RecordingListener()
    async with joined(config, first_listener) as first:

        async def commit_all(partitions: list[Partition]) -> None:
            await first.commit(dict.fromkeys(partitions, 10), first_listener.assignments)

        first_listener.on_revoked = commit_all
        assert sorted(values(await poll_records(first, 40))) == sorted(numbers(0, 40))
        before = dict(first_listener.assignments)
        polling = asyncio.create_task(poll_records(first, 1))
        async with joined(config, second_listener) as second:
            await eventually(lambda: len(first_listener.assignments) == 2)
            assert len(second_listener.assignments) == 2
            assert not set(first_listener.assignments) & set(second_listener.assignments)
            assert all(number > before[partition] for partition, number in first_listener.assignments.items())
            moved = next(iter(second_listener.assignments))
            await broker.produce(topic, [b"new"], moved.partition)
            assert values(await poll_records(second, 1)) == [b"new"]
        polling.cancel()


async def test_poll_returns_in_time_during_a_rebalance(broker: Broker, listener: RecordingListener, eventually):
    topic = await broker.topic(partitions=2)
    config = broker.config(events_topic=topic)
    release = asyncio.Event()
    slow_listener = RecordingListener(wait_for(release))
    async with joined(config, slow_listener) as source:
        second = KafkaSource(config, WallClock())
        joining = asyncio.create_task(second.start(listener))
        await eventually(lambda: "revoked" in slow_listener.history)
        async with asyncio.timeout(10):
            assert await source.poll(0.1) == []
            assert await source.poll(0.1) == []
        release.set()
        await joining
        await second.stop()


async def test_failure_of_a_rebalance_callback_is_raised(broker: Broker):
    class FailingListener:
        async def assigned(self, partitions) -> None:
            raise RuntimeError("no room")

        async def revoked(self, partitions) -> None:
            pass

    source = KafkaSource(broker.config(events_topic=await broker.topic()), WallClock())
    with pytest.raises(RuntimeError, match="no room"):
        await source.start(FailingListener())
    await source.stop()


async def test_paused_source_returns_nothing_and_stays_a_member(broker: Broker, listener: RecordingListener):
    topic = await broker.topic()
    await broker.produce(topic, numbers(0, 50))
    async with joined(broker.config(events_topic=topic, max_poll_records=10), listener) as source:
        first = values(await poll_records(source, 10))
        source.pause()
        assert [await source.poll(0.1) for _ in range(3)] == [[], [], []]
        source.resume()
        assert first + values(await poll_records(source, 50 - len(first))) == numbers(0, 50)
        assert listener.history == ["assigned"]


async def test_transaction_markers_and_aborted_records_are_neither_read_nor_lag(
    broker: Broker, listener: RecordingListener, eventually
):
    topic = await broker.topic()
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=topic) as producer:
        async with producer.transaction():
            await producer.send(topic, b"a", partition=0)
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"never", partition=0)
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send(topic, b"b", partition=0)
    async with joined(broker.config(events_topic=topic), listener) as source:
        polled = await poll_records(source, 2)
        assert [(record.offset, record.value) for part in polled for record in part.records] == [(0, b"a"), (4, b"b")]

        async def has_no_lag() -> bool:
            assert await source.poll(0.2) == []
            return source.lag() == {Partition(topic, 0): 0}

        await eventually(has_no_lag)


async def fall_behind_retention(broker: Broker, listener: RecordingListener, **options: Any) -> KafkaConfig:
    """Commit offset 2 of 10, then delete the records before offset 6."""
    topic = await broker.topic()
    config = broker.config(events_topic=topic, **options)
    await broker.produce(topic, numbers(0, 10))
    async with joined(config, listener) as source:
        await source.commit({Partition(topic, 0): 2}, listener.assignments)
    async with broker.admin() as admin:
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(6)})
    return config


def skipped(config: KafkaConfig) -> float | None:
    labels = {"topic": config.events_topic, "partition": "0"}
    return REGISTRY.get_sample_value("millrace_records_skipped_total", labels)


@pytest.mark.parametrize(("policy", "count"), [("earliest", 4), ("latest", 8)])
async def test_offset_below_retention_follows_the_policy_and_counts_what_it_skips(
    broker: Broker, listener: RecordingListener, logged: Callable[[], list[dict[str, Any]]], policy: str, count: int
):
    config = await fall_behind_retention(broker, listener, on_offset_out_of_range=policy)
    async with joined(config, listener) as source:
        while skipped(config) is None:
            polled = await source.poll(0.2)
            assert polled == []
        await broker.produce(config.events_topic, numbers(10, 12))
        expected = numbers(2 + count, 12)
        assert values(await poll_records(source, len(expected))) == expected
    assert skipped(config) == count
    assert any(line.get("records_skipped") == count for line in logged())


async def test_offset_below_retention_halts_the_worker_when_configured(broker: Broker, listener: RecordingListener):
    config = await fall_behind_retention(broker, listener, on_offset_out_of_range="halt")
    async with joined(config, listener) as source:
        with pytest.raises(SourceError, match=r"next offset is 2, .* offsets 6 to 9, .*--to-offset 6 ") as caught:
            await poll_records(source, 1)
    assert caught.value.exit_code == 4
    assert await broker.committed(config.events_topic, config.group_id) == 2


async def test_offset_beyond_the_end_is_read_from_the_beginning(broker: Broker, listener: RecordingListener):
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    await broker.produce(topic, numbers(0, 3))
    async with joined(config, listener) as source:
        await source.commit({Partition(topic, 0): 9}, listener.assignments)
    async with joined(config, listener) as source:
        assert values(await poll_records(source, 3)) == numbers(0, 3)
    assert skipped(config) == 0


async def test_undecodable_record_ends_the_source_after_the_records_before_it(
    broker: Broker, listener: RecordingListener
):
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    await broker.produce(topic, numbers(0, 3))
    await broker.append_undecodable(topic, numbers(3, 8), bad=2)
    await broker.produce(topic, [b"after"])
    source = KafkaSource(config, WallClock())
    await source.start(listener)
    polled: list[PolledRecords] = []
    while not source.exhausted:
        polled += await source.poll(0.2)
    assert values(polled) == numbers(0, 5)
    await source.commit({Partition(topic, 0): 5}, listener.assignments)
    message = rf"topic {topic}, partition 0, offset 5: .* offsets 5 to 7, .*--topic {topic}:0 .*--to-offset 8 "
    with pytest.raises(SourceError, match=message) as caught:
        await source.stop()
    assert caught.value.exit_code == 4
    assert await broker.committed(topic, config.group_id) == 5


async def test_source_that_cannot_read_the_records_before_an_undecodable_one_does_not_call_them_committed(
    broker: Broker, listener: RecordingListener, monkeypatch: pytest.MonkeyPatch
):
    async def time_out(*_: object) -> list:
        raise TimeoutError

    monkeypatch.setattr("worker.kafka.source.read_before", time_out)
    topic = await broker.topic()
    await broker.append_undecodable(topic, numbers(0, 5), bad=2)
    async with joined(broker.config(events_topic=topic), listener) as source:
        with pytest.raises(SourceUnavailable, match=rf"topic {topic}, partition 0, offset 2: .* start again"):
            await poll_records(source, 2)


async def test_missing_topic_error_contains_the_command_that_creates_it(broker: Broker, listener: RecordingListener):
    config = broker.config(events_topic=broker.name("nowhere"))
    message = r"topic nowhere.* is not on .*--create --topic.*kafka.create_topics"
    with pytest.raises(SourceError, match=message) as caught:
        await KafkaSource(config, WallClock()).start(listener)
    assert not caught.value.retriable


async def test_missing_topic_is_created_when_configured(broker: Broker, listener: RecordingListener):
    config = broker.config(events_topic=broker.name("new"), create_topics=True, partitions=3)
    async with joined(config, listener):
        assert len(listener.assignments) == 3


async def test_unreachable_broker_is_one_error_after_the_start_timeout(listener: RecordingListener):
    bootstrap = f"127.0.0.1:{free_ports(1)[0]}"
    source = KafkaSource(KafkaConfig(bootstrap_servers=bootstrap, start_timeout_s=1.2), WallClock())
    with pytest.raises(SourceUnavailable, match=rf"Kafka at {bootstrap} does not answer \(for 1.2 s: "):
        async with asyncio.timeout(10):
            await source.start(listener)


async def test_restart_of_a_static_member_causes_no_rebalance(broker: Broker, eventually):
    topic = await broker.topic(partitions=4)
    config = broker.config(events_topic=topic)
    first_config = msgspec.structs.replace(config, group_instance_id="pod-0")
    second_config = msgspec.structs.replace(config, group_instance_id="pod-1")
    first = RecordingListener()
    second = RecordingListener()
    async with joined(first_config, first):
        async with joined(second_config, second):
            await eventually(lambda: len(first.assignments) == len(second.assignments) == 2)
            before = dict(second.assignments)
            history = list(first.history)
        async with joined(second_config, second):
            assert set(second.assignments) == set(before)
            assert first.history == history


async def test_offset_owed_from_an_earlier_assignment_is_not_committed_in_a_later_one(
    broker: Broker, listener: RecordingListener, monkeypatch: pytest.MonkeyPatch, eventually
):
    topic = await broker.topic(partitions=2)
    first, second = Partition(topic, 0), Partition(topic, 1)
    config = broker.config(events_topic=topic, request_timeout_ms=1000)
    for partition in (first, second):
        await broker.produce(topic, numbers(0, 10), partition.partition)

    async def fail(member: GroupMember, offsets: object) -> None:
        raise errors.CoordinatorNotAvailableError

    async with joined(config, listener) as source:
        before = dict(listener.assignments)
        with monkeypatch.context() as patched:
            patched.setattr(GroupMember, "commit", fail)
            await source.commit({first: 3, second: 3}, before)
            assert source.uncommitted() == {first: 3, second: 3}
        polling = asyncio.create_task(poll_records(source, 100))
        other = RecordingListener()
        async with joined(config, other) as second_source:  # it takes a partition, and hands it back further on
            await eventually(lambda: len(listener.assignments) == len(other.assignments) == 1)
            (taken,) = other.assignments
            await second_source.commit({taken: 8}, other.assignments)
        await eventually(lambda: len(listener.assignments) == 2)
        await source.commit({}, listener.assignments)
        assert source.uncommitted() == {}
        polling.cancel()
    assert await broker.committed(topic, config.group_id, taken.partition) == 8


@pytest.mark.parametrize(("start_at", "expected"), [("1970-01-01T00:00:02Z", [b"2", b"3"]), ("1970-01-02", [])])
async def test_partition_without_a_committed_offset_is_read_from_the_configured_time(
    broker: Broker, listener: RecordingListener, start_at: str, expected: list[bytes]
):
    topic = await broker.topic()
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap) as producer:
        for number in range(4):
            await producer.send_and_wait(topic, b"%d" % number, timestamp_ms=1000 * number)
    async with joined(broker.config(events_topic=topic, start_at=start_at), listener) as source:
        assert values(await poll_records(source, len(expected))) == expected
        await broker.produce(topic, [b"new"])
        assert values(await poll_records(source, 1)) == [b"new"]


async def test_records_that_arrive_while_the_configured_time_is_looked_up_are_read(
    broker: Broker, listener: RecordingListener, monkeypatch: pytest.MonkeyPatch
):
    topic = await broker.topic()
    await broker.produce(topic, [b"old"])
    look_up = AIOKafkaConsumer.offsets_for_times

    async def then_produce(consumer: AIOKafkaConsumer, times: dict) -> dict:
        found = await look_up(consumer, times)
        await broker.produce(topic, [b"new"])
        return found

    monkeypatch.setattr(AIOKafkaConsumer, "offsets_for_times", then_produce)
    async with joined(broker.config(events_topic=topic, start_at="2100-01-01"), listener) as source:
        assert values(await poll_records(source, 1)) == [b"new"]
