"""Producing to and reading from the session's broker with plain aiokafka clients."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from worker.config import KafkaConfig
from worker.interfaces import Partition


class Owner:
    """A Rebalance that remembers what it was told."""

    def __init__(self, on_revoked: Callable[[list[Partition]], Awaitable[None]] | None = None) -> None:
        self.assignments: dict[Partition, int] = {}
        self.history: list[str] = []
        self.on_revoked = on_revoked

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        self.assignments = dict(partitions)
        self.history.append("assigned")

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        self.history.append("revoked")
        if self.on_revoked:
            await self.on_revoked(list(partitions))
        self.assignments = {}


class Broker:
    """What a test does to the broker behind the worker's back."""

    def __init__(self, bootstrap: str, name: Callable[[str], str]) -> None:
        self.bootstrap, self.name = bootstrap, name

    def config(self, **changes: Any) -> KafkaConfig:
        own = {"bootstrap_servers": self.bootstrap, "group_id": self.name("group"), "session_timeout_ms": 6000}
        return KafkaConfig(**(own | changes))

    async def topic(self, partitions: int = 1, kind: str = "events") -> str:
        topic = self.name(kind)
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        response = await admin.create_topics([NewTopic(topic, partitions, 1)])
        assert [entry["error_code"] for entry in response.to_object()["topic_errors"]] == [0]
        await admin.close()
        return topic

    async def produce(self, topic: str, values: Iterable[bytes], partition: int | None = 0) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            for value in values:
                await producer.send(topic, value, key=value, partition=partition)
            await producer.flush()

    async def read(self, topic: str, count: int) -> list:
        """All records, once there are `count`, in the order of their consumed; more than that are returned, too."""
        records: list = []
        async with AIOKafkaConsumer(topic, bootstrap_servers=self.bootstrap, auto_offset_reset="earliest") as consumer:
            while len(records) < count or await self._behind(consumer):
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    records += batch
        return records

    async def _behind(self, consumer: AIOKafkaConsumer) -> bool:
        ends = await consumer.end_offsets(consumer.assignment())
        return any([await consumer.position(tp) < end for tp, end in ends.items()])

    async def committed(self, topic: str, group: str, partition: int = 0) -> int | None:
        async with AIOKafkaConsumer(bootstrap_servers=self.bootstrap, group_id=group) as consumer:
            consumer.assign([TopicPartition(topic, partition)])
            return await consumer.committed(TopicPartition(topic, partition))
