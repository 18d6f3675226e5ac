import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from tests.kafka.broker import Broker, Owner
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Partition, PolledRecords, RebalanceListener
from worker.kafka.source import KafkaSource
from worker.replay.child_process import free_ports
from worker.replay.local_servers import LocalKafka

CRC_AT = 17  # in a batch: of what follows it


@asynccontextmanager
async def joined(config: KafkaConfig, owner: RebalanceListener) -> AsyncIterator[KafkaSource]:
    source = KafkaSource(config, WallClock())
    await source.start(owner)
    try:
        yield source
    finally:
        await source.stop()


async def polled(source: KafkaSource, count: int) -> list[PolledRecords]:
    """Polls until `count` records have come; the test's deadline ends it otherwise."""
    shares: list[PolledRecords] = []
    while sum(len(share.records) for share in shares) < count:
        shares += await source.poll(0.2)
    return shares


def values(shares: list[PolledRecords]) -> list[bytes]:
    return [record.value or b"" for share in shares for record in share.records]


def numbers(start: int, stop: int) -> list[bytes]:
    return [b"%d" % n for n in range(start, stop)]


def test_records_come_in_order_with_their_epoch_and_the_partitions_end(run, broker, owner):
    async def scenario() -> None:
        topic = await broker.topic()
        await broker.produce(topic, numbers(0, 300))
        async with joined(broker.config(events_topic=topic, max_poll_records=100), owner) as source:
            shares = await polled(source, 300)
            assert values(shares) == numbers(0, 300)
            assert max(len(share.records) for share in shares) <= 100
            assert {share.assignment for share in shares} == set(owner.assignments.values())
            assert {share.end_offset for share in shares} == {300}
            assert source.lag() == {Partition(topic, 0): 0}

    run(scenario())


def test_a_restart_goes_on_behind_the_commit(run, broker, owner):
    async def scenario() -> None:
        topic = await broker.topic()
        config = broker.config(events_topic=topic)
        await broker.produce(topic, numbers(0, 10))
        async with joined(config, owner) as source:
            await polled(source, 10)
            await source.commit({Partition(topic, 0): 7}, owner.assignments)
        async with joined(config, owner) as source:
            assert values(await polled(source, 3)) == numbers(7, 10)

    run(scenario())


def test_a_commit_of_another_epoch_is_not_sent(run, broker, owner):
    async def scenario() -> None:
        topic = await broker.topic()
        config = broker.config(events_topic=topic)
        await broker.produce(topic, numbers(0, 10))
        async with joined(config, owner) as source:
            await source.commit({Partition(topic, 0): 5}, owner.assignments)
            await source.commit({Partition(topic, 0): 3}, {Partition(topic, 0): -1})
        assert await broker.committed(topic, config.group_id) == 5

    run(scenario())


def test_a_member_that_the_group_forgot_cannot_move_offsets_back(run, broker):
    async def scenario() -> None:
        topic = await broker.topic()
        config = broker.config(events_topic=topic)
        release = asyncio.Event()

        async def slowly(partitions: list[Partition]) -> None:
            await release.wait()

        owner = Owner(slowly)
        async with joined(config, owner) as source:
            await source.commit({Partition(topic, 0): 5}, owner.assignments)
            # The group is empty now, as after a missed session: the broker takes commits without a generation.
            await source._member._coordinator._maybe_leave_group()
            await source.commit({Partition(topic, 0): 3}, owner.assignments)
            assert await broker.committed(topic, config.group_id) == 5
            release.set()

    run(scenario())


def test_members_share_the_partitions_and_hand_over_what_is_settled(run, broker, eventually, topics):
    async def scenario() -> None:
        topic = await broker.topic(partitions=4)
        config = broker.config(events_topic=topic)
        for partition in range(4):
            await broker.produce(topic, numbers(10 * partition, 10 * partition + 10), partition)

        first_owner, second_owner = Owner(), Owner()
        async with joined(config, first_owner) as first:

            async def settle(partitions: list[Partition]) -> None:
                await first.commit(dict.fromkeys(partitions, 10), first_owner.assignments)

            first_owner.on_revoked = settle
            assert sorted(values(await polled(first, 40))) == sorted(numbers(0, 40))
            before = dict(first_owner.assignments)
            polling = asyncio.create_task(polled(first, 1))
            async with joined(config, second_owner) as second:
                await eventually(lambda: len(first_owner.assignments) == 2)
                assert len(second_owner.assignments) == 2
                assert not set(first_owner.assignments) & set(second_owner.assignments)
                assert all(epoch > before[partition] for partition, epoch in first_owner.assignments.items())
                theirs = next(iter(second_owner.assignments))
                await broker.produce(topic, [b"new"], theirs.partition)
                assert values(await polled(second, 1)) == [b"new"]
            polling.cancel()

    run(scenario())


def test_a_poll_returns_in_time_while_the_group_rebalances(run, broker, eventually):
    async def scenario() -> None:
        topic = await broker.topic(partitions=2)
        config = broker.config(events_topic=topic)
        release = asyncio.Event()

        async def slowly(partitions: list[Partition]) -> None:
            await release.wait()

        slow, other = Owner(slowly), Owner()
        async with joined(config, slow) as source:
            second = KafkaSource(config, WallClock())
            joining = asyncio.create_task(second.start(other))
            await eventually(lambda: "revoked" in slow.history)
            async with asyncio.timeout(1):
                assert await source.poll(0.1) == []
                assert await source.poll(0.1) == []
            release.set()
            await joining
            await second.stop()

    run(scenario())


def test_a_failed_rebalance_is_raised_by_the_next_poll(run, broker):
    class Refusing:
        async def assigned(self, partitions) -> None:
            raise RuntimeError("no room")

        async def revoked(self, partitions) -> None:
            pass

    async def scenario() -> None:
        topic = await broker.topic()
        source = KafkaSource(broker.config(events_topic=topic), WallClock())
        with pytest.raises(RuntimeError, match="no room"):
            await source.start(Refusing())
        await source.stop()

    run(scenario())


def test_a_paused_source_gives_nothing_stays_a_member_and_goes_on(run, broker, owner):
    async def scenario() -> None:
        topic = await broker.topic()
        await broker.produce(topic, numbers(0, 50))
        async with joined(broker.config(events_topic=topic, max_poll_records=10), owner) as source:
            first = values(await polled(source, 10))
            source.pause()
            assert [await source.poll(0.1) for _ in range(3)] == [[], [], []]
            source.resume()
            assert first + values(await polled(source, 50 - len(first))) == numbers(0, 50)
            assert owner.history == ["assigned"]

    run(scenario())


def test_markers_and_aborted_transactions_are_neither_records_nor_lag(run, broker, owner, eventually):
    async def scenario() -> None:
        topic = await broker.topic()
        async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=topic) as producer:
            async with producer.transaction():
                await producer.send(topic, b"a", partition=0)
            await producer.begin_transaction()
            await producer.send_and_wait(topic, b"never", partition=0)
            await producer.abort_transaction()
            async with producer.transaction():
                await producer.send(topic, b"b", partition=0)
        async with joined(broker.config(events_topic=topic), owner) as source:
            shares = await polled(source, 2)
            assert [(r.offset, r.value) for share in shares for r in share.records] == [(0, b"a"), (4, b"b")]
            await source.poll(0.2)
            assert source.lag() == {Partition(topic, 0): 0}

    run(scenario())


def test_offsets_that_are_gone_are_read_from_the_beginning_and_said_aloud(run, broker, owner, capfd):
    async def scenario() -> None:
        topic = await broker.topic()
        config = broker.config(events_topic=topic)
        await broker.produce(topic, numbers(0, 10))
        async with joined(config, owner) as source:
            await source.commit({Partition(topic, 0): 2}, owner.assignments)
        admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
        await admin.start()
        await admin.delete_records({TopicPartition(topic, 0): RecordsToDelete(6)})
        await admin.close()
        async with joined(config, owner) as source:
            assert values(await polled(source, 4)) == numbers(6, 10)

    run(scenario())
    out, err = capfd.readouterr()
    assert "reading from its beginning" in out + err


async def append_undecodable(broker: Broker, topic: str, values: list[bytes], bad: int) -> None:
    """One batch of records, of which one has a header's name that is not UTF-8."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=1 << 20,
    )  # fmt: skip
    for number, value in enumerate(values):
        builder.append(number, 0, None, value, [("plain" if number != bad else "wrong", b"")])
    raw = builder.build().replace(b"wrong", b"wr\xffng")
    raw[CRC_AT : CRC_AT + 4] = calc_crc32c(raw[CRC_AT + 4 :]).to_bytes(4, "big")
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap) as producer:
        await producer.partitions_for(topic)
        leader = producer.client.cluster.leader_for_partition(TopicPartition(topic, 0))
        request = ProduceRequest(None, 1, 10_000, [(topic, [(0, bytes(raw))])])
        response = await producer.client.send(leader, request)
        assert response.topics[0][1][0][1] == 0


def test_a_record_that_cannot_be_decoded_ends_the_source_behind_what_lies_before_it(run, broker, owner):
    async def scenario() -> None:
        topic = await broker.topic()
        config = broker.config(events_topic=topic)
        await broker.produce(topic, numbers(0, 3))
        await append_undecodable(broker, topic, numbers(3, 8), bad=2)
        await broker.produce(topic, [b"after"])
        source = KafkaSource(config, WallClock())
        await source.start(owner)
        shares: list[PolledRecords] = []
        while not source.exhausted:
            shares += await source.poll(0.2)
        assert values(shares) == numbers(0, 5)
        await source.commit({Partition(topic, 0): 5}, owner.assignments)
        where = rf"topic {topic}, partition 0, offset 5: .* offsets 5 to 7, .*--topic {topic}:0 .*--to-offset 8 "
        with pytest.raises(SourceError, match=where) as caught:
            await source.stop()
        assert caught.value.exit_code == 4
        assert await broker.committed(topic, config.group_id) == 5

    run(scenario())


def test_a_missing_topic_is_one_sentence_with_the_command_that_makes_it(run, broker, owner, topics):
    config = broker.config(events_topic=topics("nowhere"))
    with pytest.raises(
        SourceError, match=r"topic nowhere.* is not on .*--create --topic.*kafka.create_topics"
    ) as caught:
        run(KafkaSource(config, WallClock()).start(owner))
    assert not caught.value.retriable


def test_a_missing_topic_is_created_when_asked_for(run, broker, owner, topics):
    async def scenario() -> None:
        config = broker.config(events_topic=topics("new"), create_topics=True, partitions=3)
        async with joined(config, owner):
            assert len(owner.assignments) == 3

    run(scenario())


def test_a_broker_that_is_down_is_one_clear_sentence_after_the_start_timeout(run, owner):
    bootstrap = f"127.0.0.1:{free_ports(1)[0]}"
    source = KafkaSource(KafkaConfig(bootstrap_servers=bootstrap, start_timeout_s=1.2), WallClock())
    with pytest.raises(SourceUnavailable, match=rf"no answer from Kafka at {bootstrap} within 1.2 s"):
        run(source.start(owner), timeout_s=10)


def test_a_broker_that_dies_and_comes_back_is_waited_out(run, kafka, topics, owner, eventually, tmp_path):
    async def scenario(server: LocalKafka) -> None:
        broker = Broker(server.bootstrap, topics)
        topic = await broker.topic()
        config = broker.config(events_topic=topic, session_timeout_ms=30000)
        await broker.produce(topic, numbers(0, 10))
        async with joined(config, owner) as source:
            await polled(source, 10)
            await asyncio.to_thread(server.kill)
            committing = asyncio.create_task(source.commit({Partition(topic, 0): 10}, owner.assignments))
            assert await source.poll(0.2) == []
            await asyncio.to_thread(server.start)
            await committing
            await broker.produce(topic, [b"after"])
            assert values(await polled(source, 1)) == [b"after"]
        assert await broker.committed(topic, config.group_id) == 10

    with LocalKafka(tmp_path) as server:
        run(scenario(server), timeout_s=90)


def test_a_static_member_that_restarts_disturbs_nobody(run, broker, eventually):
    async def scenario() -> None:
        topic = await broker.topic(partitions=4)
        config = broker.config(events_topic=topic)
        here, there = Owner(), Owner()
        async with joined(msgspec.structs.replace(config, group_instance_id="pod-0"), here):
            async with joined(msgspec.structs.replace(config, group_instance_id="pod-1"), there):
                await eventually(lambda: len(here.assignments) == len(there.assignments) == 2)
                before, history = dict(there.assignments), list(here.history)
            async with joined(msgspec.structs.replace(config, group_instance_id="pod-1"), there):
                assert set(there.assignments) == set(before)
                assert here.history == history

    run(scenario())
