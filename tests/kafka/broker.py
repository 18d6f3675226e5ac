"""Real brokers for tests, and plain aiokafka clients to prepare and inspect them independently of the worker."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from worker.config import KafkaConfig
from worker.interfaces import Partition
from worker.replay.child_process import HOST, free_ports
from worker.replay.local_servers import LocalKafka

CRC_AT = 17  # position of the checksum in a batch; it covers everything after it
PLAIN_LOGIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"


class RecordingListener:
    """A RebalanceListener that records its calls."""

    def __init__(self, on_revoked: Callable[[list[Partition]], Awaitable[Any]] | None = None) -> None:
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


@asynccontextmanager
async def admin_client(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started admin client; it is closed at the end."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


class Broker:
    """Operations on a broker that is addressed by `bootstrap`. name: makes unique topic and group names."""

    def __init__(self, bootstrap: str, name: Callable[[str], str]) -> None:
        self.bootstrap = bootstrap
        self.name = name

    def config(self, **changes: Any) -> KafkaConfig:
        own = {"bootstrap_servers": self.bootstrap, "group_id": self.name("group"), "session_timeout_ms": 6000}
        return KafkaConfig(**(own | changes))

    def admin(self) -> AbstractAsyncContextManager[AIOKafkaAdminClient]:
        return admin_client(self.bootstrap)

    async def topic(self, partitions: int = 1, kind: str = "events", settings: dict[str, str] | None = None) -> str:
        """Create a topic and return its name."""
        topic = self.name(kind)
        async with self.admin() as admin:
            response = await admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=settings)])
        assert [entry["error_code"] for entry in response.to_object()["topic_errors"]] == [0]
        return topic

    async def recreate(self, topic: str, partitions: int = 1) -> None:
        """Delete the topic and create it again."""
        async with self.admin() as admin:
            await admin.delete_topics([topic])
            while topic in await admin.list_topics():  # noqa: ASYNC110 - Kafka cannot notify
                await asyncio.sleep(0.02)
            response = await admin.create_topics([NewTopic(topic, partitions, 1)])
            assert [entry["error_code"] for entry in response.to_object()["topic_errors"]] == [0]
            while (await admin.describe_topics([topic]))[0]["error_code"]:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.02)

    async def produce(self, topic: str, values: Iterable[bytes], partition: int | None = 0) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            for value in values:
                await producer.send(topic, value, key=value, partition=partition)
            await producer.flush()

    async def append_undecodable(self, topic: str, values: Sequence[bytes], bad: int, partition: int = 0) -> None:
        """Append one batch in which record `bad` has a header name that is not UTF-8."""
        batch = record_batch([(value, "plain" if number != bad else "wrong") for number, value in enumerate(values)])
        raw = batch.replace(b"wrong", b"wr\xffng")
        raw[CRC_AT : CRC_AT + 4] = calc_crc32c(raw[CRC_AT + 4 :]).to_bytes(4, "big")
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            await producer.partitions_for(topic)
            leader = producer.client.cluster.leader_for_partition(TopicPartition(topic, partition))
            request = ProduceRequest(None, 1, 10_000, [(topic, [(partition, bytes(raw))])])
            response = await producer.client.send(leader, request)
            assert response.topics[0][1][0][1] == 0

    async def read(self, topic: str, count: int) -> list:
        """Return all records in the order of their arrival, once there are at least `count`."""
        records: list = []
        async with AIOKafkaConsumer(topic, bootstrap_servers=self.bootstrap, auto_offset_reset="earliest") as consumer:
            while len(records) < count or await self._has_unread(consumer):
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    records += batch
        return records

    async def _has_unread(self, consumer: AIOKafkaConsumer) -> bool:
        ends = await consumer.end_offsets(consumer.assignment())
        return any([await consumer.position(tp) < end for tp, end in ends.items()])

    async def committed(self, topic: str, group: str, partition: int = 0) -> int | None:
        async with AIOKafkaConsumer(bootstrap_servers=self.bootstrap, group_id=group) as consumer:
            consumer.assign([TopicPartition(topic, partition)])
            return await consumer.committed(TopicPartition(topic, partition))


def record_batch(records: Sequence[tuple[bytes, str]]) -> bytearray:
    """Return a batch of records from offset 0, each with its value and the name of its only header."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 20,
    )
    for offset, (value, header_name) in enumerate(records):
        builder.append(offset, 0, None, value, [(header_name, b"")])
    return builder.build()


class BreakableKafka(LocalKafka):
    """A broker that tests may suspend and kill. It also listens with SASL: user 'shop', password 'right'."""

    def __init__(self, data_dir: Path) -> None:
        port, sasl_port, controller_port = free_ports(3)
        plain = f"PLAINTEXT://{HOST}:{port}"
        sasl = f"SASL://{HOST}:{sasl_port}"
        settings = {
            "listeners": f"{plain},{sasl},CONTROLLER://{HOST}:{controller_port}",
            "advertised.listeners": f"{plain},{sasl}",
            "controller.quorum.voters": f"1@{HOST}:{controller_port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl.plain.sasl.jaas.config": f'{PLAIN_LOGIN} user_shop="right";',
        }
        super().__init__(data_dir, port, settings=settings)
        self.sasl_bootstrap = f"{HOST}:{sasl_port}"

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restore(self) -> None:
        """Start or resume a broker that a failed test left broken."""
        if self._process is None:
            self.start()
        self.resume()
