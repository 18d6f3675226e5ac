"""Rebuilds of a real Valkey that lost some rings: whole ones stay, the others get everything that is left."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewPartitions
from msgspec.structs import replace

from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.rebuilds import Shop, read_rings, rebuild
from worker.clock import WallClock
from worker.errors import SourceError
from worker.interfaces import ConsumedEvent
from worker.kafka.source import KafkaSource
from worker.operations.group_fence import GroupFence
from worker.operations.rebuild import Rebuild
from worker.redis.client import RedisClient


async def test_user_on_two_partitions_gets_every_event(broker: Broker, client: RedisClient):
    shop = await Shop.open(broker, client, max_poll_records=1000)  # one poll returns both partitions
    await shop.produce(40)
    await shop.work()
    await client.pipeline([("DEL", key) for key in await read_rings(client, shop.topic)])
    _, report = await rebuild(shop.config, client)
    assert (report.restored, report.users) == (80, 4)
    assert await shop.rings() == shop.expected()


async def test_whole_ring_keeps_events_that_the_topic_no_longer_has(broker: Broker, client: RedisClient):
    shop = await Shop.open(broker, client)
    await shop.produce(40)
    await shop.work()
    before = await read_rings(client, shop.topic)
    lost, *_, kept = before
    await client.call("DEL", lost)
    await shop.delete_before(20)
    plan, report = await rebuild(shop.config, client)
    assert (plan.lost, report.lost, report.restored, report.rewritten) == (40, 0, 10, 0)
    after = await read_rings(client, shop.topic)
    assert {key: after[key] for key in before if key != lost} == {key: before[key] for key in before if key != lost}
    rings = await shop.rings()
    assert rings[kept] == shop.expected()[kept]
    assert rings[lost] == shop.expected(deleted=20)[lost]


@pytest.mark.parametrize("lost_after", [0, 40])
async def test_rings_that_received_events_after_their_loss_get_those_before_it(
    broker: Broker, client: RedisClient, lost_after: int
):
    """Redis is set back to its state after `lost_after` events, which retention deletes, and works on."""
    shop = await Shop.open(broker, client)
    await shop.produce(20)
    await shop.work()
    snapshot = await read_rings(client, shop.topic)
    await shop.produce(20)
    await shop.work()
    keys = list(snapshot)
    await client.pipeline([("SET", key, snapshot[key]) if lost_after else ("DEL", key) for key in keys])
    await shop.produce(20)
    await shop.work()
    await shop.delete_before(20)
    _, report = await rebuild(shop.config, client)
    assert report.rewritten == 4
    assert await shop.rings() == shop.expected(deleted=0 if lost_after else 20)
    _, again = await rebuild(shop.config, client)
    assert (again.restored, again.rewritten) == (0, 0)


@pytest.mark.parametrize("before_pass", [1, 2])
@pytest.mark.parametrize("deleted", [20, 30, 50, 60])
async def test_retention_during_a_rebuild_takes_no_event_from_a_ring(
    broker: Broker, client: RedisClient, before_pass: int, deleted: int
):
    """Redis has lost offsets 20 to 39 of each partition: those that retention deletes before they are read are lost."""
    shop = await Shop.open(broker, client)
    await shop.leave_gaps(20)

    class RebuildDuringRetention(Rebuild):
        passes = 0

        async def _read(self, *args) -> AsyncIterator[tuple[list[ConsumedEvent], int]]:
            self.passes += 1
            if self.passes == before_pass:
                await shop.delete_before(deleted)
            async for item in super()._read(*args):
                yield item

    _, report = await RebuildDuringRetention(shop.config, client, WallClock()).run(False, lambda offsets, total: None)
    assert report.lost == 2 * deleted
    assert report.restored == 2 * max(0, 40 - deleted)
    assert await shop.rings() == shop.expected(lost=range(20, min(deleted, 40)))


async def test_failure_in_any_pass_leaves_each_ring_as_it_was(broker: Broker, client: RedisClient):
    shop = await Shop.open(broker, client)
    await shop.leave_gaps(20)
    before = await read_rings(client, shop.topic)
    polls = 0

    class FailingRebuild(Rebuild):
        async def _read(self, *args) -> AsyncIterator[tuple[list[ConsumedEvent], int]]:
            nonlocal polls
            async for item in super()._read(*args):
                polls += 1
                if polls in (3, 12):
                    raise SourceError("stopped")
                yield item

    for _ in range(2):
        with pytest.raises(SourceError, match="stopped"):
            await FailingRebuild(shop.config, client, WallClock()).run(False, lambda offsets, total: None)
        assert await read_rings(client, shop.topic) == before
    await rebuild(shop.config, client)
    assert await shop.rings() == shop.expected()


async def test_worker_that_starts_meanwhile_ends_the_rebuild_and_loses_no_event(
    broker: Broker, client: RedisClient, eventually
):
    shop = await Shop.open(broker, client)
    await shop.produce(40)
    await shop.work()
    await client.pipeline([("DEL", key) for key in await read_rings(client, shop.topic)])
    working: list[asyncio.Task] = []

    class RebuildBesideWorker(Rebuild):
        """A worker joins after the first poll was pushed."""

        async def _read(self, *args) -> AsyncIterator[tuple[list[ConsumedEvent], int]]:
            async for item in super()._read(*args):
                yield item
                if not working:
                    working.append(asyncio.create_task(shop.work()))
                    await eventually(lambda: self._fence is not None and self._fence._given_up)

    await shop.produce(40)
    with pytest.raises(SourceError, match=r"was joined by a worker.*; stop the workers, then run rebuild again"):
        await RebuildBesideWorker(shop.config, client, WallClock()).run(False, lambda offsets, total: None)
    await working[0]
    assert 0 < sum(len(events) for events, _ in (await shop.rings()).values()) < 160
    await rebuild(shop.config, client)
    assert await shop.rings() == shop.expected()


async def test_running_rebuild_keeps_the_partitions_from_a_worker_until_its_write_is_done(
    broker: Broker, client: RedisClient, listener: RecordingListener, eventually
):
    shop = await Shop.open(broker, client)
    partitions = [TopicPartition(shop.topic, partition) for partition in range(2)]
    async with GroupFence(shop.config.kafka, WallClock(), partitions) as fence:
        async with fence.writing():
            source = KafkaSource(shop.config.kafka, WallClock())
            starting = asyncio.create_task(source.start(listener))
            await eventually(lambda: fence._given_up)
            assert listener.history == []
        with pytest.raises(SourceError, match="was joined by a worker"):
            async with fence.writing():
                pass
    await starting
    await source.stop()


async def test_partitions_that_are_added_meanwhile_end_the_rebuild_and_are_named(
    broker: Broker, client: RedisClient, eventually
):
    shop = await Shop.open(broker, client)
    kafka = replace(shop.config.kafka, metadata_max_age_ms=200)
    partitions = [TopicPartition(shop.topic, partition) for partition in range(2)]
    async with GroupFence(kafka, WallClock(), partitions) as fence:
        async with broker.admin() as admin:
            await admin.create_partitions({shop.topic: NewPartitions(3)})
        await eventually(lambda: fence._given_up)
        with pytest.raises(SourceError, match=r"has 3 partitions, and had 2 when the rebuild began; run rebuild again"):
            await fence.keep_alive()
        with pytest.raises(SourceError, match="has 3 partitions"):
            async with fence.writing():
                pass


async def test_partitions_that_are_added_before_the_rebuild_joins_are_named(broker: Broker, client: RedisClient):
    shop = await Shop.open(broker, client)
    with pytest.raises(SourceError, match="has 2 partitions, and had 1 when the rebuild began"):
        async with GroupFence(shop.config.kafka, WallClock(), [TopicPartition(shop.topic, 0)]):
            pass
