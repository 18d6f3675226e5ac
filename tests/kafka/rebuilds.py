"""Rebuilds for tests: a topic with users on both of its partitions, a worker that pushes them, and rings to compare."""

from collections.abc import Container

import msgspec
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from pipeline.records import Event
from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.sources import joined
from tests.oracle import Oracle
from worker.clock import WallClock
from worker.config import Config
from worker.operations.rebuild import Rebuild, RebuildPlan, RebuildReport
from worker.redis.client import RedisClient
from worker.redis.rings.sequences import SequenceStore
from worker.stream.codec import Codec

NOW_MS = WallClock().now_ms()


async def rebuild(config: Config, client: RedisClient, force: bool = False) -> tuple[RebuildPlan, RebuildReport]:
    return await Rebuild(config, client, WallClock()).run(force, lambda report, total: None)


async def read_rings(client: RedisClient, topic: str) -> dict[str, bytes]:
    keys = [f"seq:{{u:{topic}.u{number}}}" for number in range(4)]
    values = await client.pipeline([("GET", key) for key in keys])
    return {key: value for key, value in zip(keys, values, strict=True) if value}


class Shop:
    """Events of four users, each on two partitions, and a worker that pushes them to the rings."""

    def __init__(self, broker: Broker, config: Config, client: RedisClient) -> None:
        self.broker = broker
        self.config = config
        self.client = client
        self.topic = config.kafka.events_topic
        self.values: list[list[bytes]] = [[], []]

    @classmethod
    async def open(cls, broker: Broker, client: RedisClient, max_poll_records: int = 20) -> "Shop":
        kafka = broker.config(events_topic=await broker.topic(2), max_poll_records=max_poll_records)
        return cls(broker, Config(kafka=kafka), client)

    async def produce(self, count: int) -> None:
        for partition, values in enumerate(self.values):
            start = len(values)
            values += [self.value(partition, number) for number in range(start, start + count)]
            await self.broker.produce(self.topic, values[start:], partition)

    def value(self, partition: int, number: int) -> bytes:
        user = f"{self.topic}.u{number % 4}"
        return msgspec.json.encode(Event(user, f"i{partition}.{number}", "view", NOW_MS - 100_000 + number))

    async def work(self) -> None:
        """Push and commit every event, then leave the group."""
        store = SequenceStore(self.client, self.config.sequences)
        async with joined(self.config.kafka, RecordingListener()) as source:
            while not await self.is_committed():
                polled = await source.poll(0.1)
                events, _ = Codec(self.config, WallClock()).decode_all(polled)
                await store.push(events)
                ends = {part.partition: part.records[-1].offset + 1 for part in polled}
                await source.commit(ends, {part.partition: part.assignment for part in polled})

    async def leave_gaps(self, count: int) -> None:
        """Push three times `count` events per partition, of which Redis loses the second, and retention none."""
        await self.produce(count)
        await self.work()
        snapshot = await read_rings(self.client, self.topic)
        await self.produce(count)
        await self.work()
        await self.client.pipeline([("SET", key, value) for key, value in snapshot.items()])
        await self.produce(count)
        await self.work()

    async def is_committed(self) -> bool:
        group_id = self.config.kafka.group_id
        committed = [await self.broker.committed(self.topic, group_id, partition) for partition in range(2)]
        return committed == [len(values) for values in self.values]

    async def delete_before(self, offset: int) -> None:
        async with self.broker.admin() as admin:
            await admin.delete_records({TopicPartition(self.topic, p): RecordsToDelete(offset) for p in range(2)})

    async def rings(self) -> dict[str, tuple[list[bytes], set[bytes]]]:
        """Return the events of each ring, sorted, and its sources."""
        return {key: contents(value) for key, value in (await read_rings(self.client, self.topic)).items()}

    def expected(self, deleted: int = 0, lost: Container[int] = ()) -> dict[str, tuple[list[bytes], set[bytes]]]:
        """Return the same by the oracle, without the first `deleted` events of each partition and the lost offsets."""
        oracle = Oracle(self.topic, self.config.sequences.max_events)
        for partition, values in enumerate(self.values):
            kept = [offset for offset in range(deleted, len(values)) if offset not in lost]
            for offset, value in [(offset, values[offset]) for offset in kept]:
                oracle.feed(partition, offset, msgspec.json.decode(value))
        return {key: contents(value) for key, value in oracle.rings().items()}


def contents(ring: bytes) -> tuple[list[bytes], set[bytes]]:
    events = sorted(ring[at : at + 24] for at in range(40, len(ring), 24))
    return events, {ring[8:24], ring[24:40]}
