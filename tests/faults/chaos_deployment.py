"""All that a chaos run may break: two brokers, a Valkey that keeps its data, workers of one group, their traffic."""

import asyncio
import itertools
import random
import signal
import subprocess
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import msgspec
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from aiokafka.errors import KafkaError
from redis.asyncio import Redis

from tests.faults.processes import launch, run_command
from tests.faults.topics import decode, origin, read_to_end
from tests.kafka.broker import admin_client
from tests.kafka.reassignment import move_partitions
from tests.oracle import ACTIONS, Oracle
from worker.replay.child_process import HOST, free_ports
from worker.replay.local_servers import LocalKafka, LocalValkey

EVENTS, SLATES, DEAD_LETTERS, GROUP = "events", "recommendations", "events.dead", "chaos"
PARTITIONS = 3
RING_EVENTS = 16
EVENTS_PER_S = 100  # two workers on two busy cores keep up with it
USERS = 50  # per partition
START_TIMEOUT_S = 60.0
INVALID = (b"{", b'{"user_id":"u1","item_id":"i","action":"dance","ts_ms":5}', b"\xff\xfe")
INVALID_FRACTION = 0.02
FIRST_MS = 1_700_000_000_000
DURABLE = {"appendonly": "yes", "appendfsync": "always"}  # a kill loses no acknowledged write
Key = tuple[int, int]  # partition and offset


class Member(NamedTuple):
    """A worker process and its log."""

    process: subprocess.Popen
    log: Path


class Deployment:
    """The servers, the workers and the traffic of one run, and the record of all that was produced.

    seed:      of the traffic
    artifacts: folders of two models; the workers serve the one that the link `current` points to
    """

    def __init__(self, folder: Path, seed: int, artifacts: tuple[Path, Path]) -> None:
        self._folder = folder
        self.kafka = LocalKafka(folder / "kafka", heap_mib=384)
        self.broker_id = 2
        self.broker = self._make_broker()
        self.valkey = LocalValkey(folder / "valkey", settings=DURABLE)
        self.artifacts = artifacts
        self.link = folder / "current"
        self.link.symlink_to(artifacts[0])
        self.members: list[Member] = []
        self.partitions = PARTITIONS
        self.is_truncated = False
        self._rng = random.Random(seed)
        self._homes: dict[str, int] = {}  # each user's partition: more partitions move no user
        self._history: dict[Key, ConsumerRecord] = {}
        self._absorbed: dict[int, int] = {}  # next offset by partition
        self._started = itertools.count()
        self._traffic: asyncio.Task | None = None

    async def __aenter__(self) -> "Deployment":
        for server in (self.kafka, self.broker, self.valkey):
            await asyncio.to_thread(server.start)
        replicas = {number: [self.broker_id] for number in range(PARTITIONS)}
        async with self.admin() as admin:
            await admin.create_topics([NewTopic(name, -1, -1, replicas) for name in (EVENTS, SLATES, DEAD_LETTERS)])
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.kafka.bootstrap, enable_idempotence=True, request_timeout_ms=120_000
        )
        self._traffic = asyncio.create_task(self._produce(), name="traffic")
        for _ in range(2):
            self.start_member()
        await asyncio.gather(*map(self.wait_assigned, self.members))
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            await self.stop_traffic()
        finally:
            for member in self.members:
                member.process.kill()
            for server in (self.broker, self.kafka, self.valkey):
                await asyncio.to_thread(server.kill)

    @property
    def settings(self) -> dict[str, object]:
        return {
            "KAFKA__BOOTSTRAP_SERVERS": self.kafka.bootstrap,
            "KAFKA__GROUP_ID": GROUP,
            "KAFKA__SESSION_TIMEOUT_MS": 6000,  # the smallest that the broker allows
            "KAFKA__REBALANCE_TIMEOUT_MS": 10_000,
            "KAFKA__MAX_POLL_RECORDS": 200,
            "REDIS__URL": self.valkey.url,
            "REDIS__TIMEOUT_S": 0.5,
            "SEQUENCES__MAX_EVENTS": RING_EVENTS,
            "EVENTS__MAX_AGE_DAYS": 0,
            "DEAD_LETTERS__MAX_RATIO": 0.5,
            "HEALTH__COMMIT_INTERVAL_S": 0.2,
            "HEALTH__DRAIN_TIMEOUT_S": 5,
            "PIPELINE__ARTIFACT": self.link,
            "PIPELINE__ARTIFACT_POLL_INTERVAL_S": 0.5,
            "PIPELINE__THREADS": 1,
        }

    def _make_broker(self) -> LocalKafka:
        """Return the broker that holds the topics; `kafka` is the controller and where clients find the others."""
        port = free_ports(1)[0]
        settings = {
            "process.roles": "broker",
            "node.id": self.broker_id,
            "controller.quorum.voters": self.kafka.quorum,
            "listeners": f"PLAINTEXT://{HOST}:{port}",
        }
        return LocalKafka(self._folder / f"broker-{self.broker_id}", port, heap_mib=384, settings=settings)

    def start_member(self) -> Member:
        log = self._folder / f"member-{next(self._started)}.log"
        self.members.append(Member(launch(log, **self.settings), log))
        return self.members[-1]

    async def wait_assigned(self, member: Member) -> None:
        """Return when the group has given a worker partitions for the first time. TimeoutError."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while "partitions assigned" not in member.log.read_text():  # noqa: ASYNC110 - a file cannot notify
                await asyncio.sleep(0.1)

    async def stop_member(self, member: Member) -> int:
        """Ask a worker to drain and return its exit status."""
        self.members.remove(member)
        member.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(member.process.wait, 60)

    async def run_command(self, *words: str) -> subprocess.CompletedProcess:
        """Run `millrace WORDS...` to its end beside the workers."""
        return await asyncio.to_thread(run_command, words, self.settings)

    def admin(self) -> AbstractAsyncContextManager[AIOKafkaAdminClient]:
        return admin_client(self.kafka.bootstrap)

    def redis(self) -> Redis:
        return Redis.from_url(self.valkey.url)

    async def stop_traffic(self) -> None:
        """Send nothing more. Raises what has ended the traffic before."""
        if self._traffic is not None:
            self._traffic.cancel()
            await asyncio.wait({self._traffic})
            traffic = self._traffic
            self._traffic = None
            if not traffic.cancelled():
                traffic.result()

    def event(self) -> tuple[int, bytes, bytes]:
        """Return the partition, key and value of the next record; now and then it is no valid event."""
        rng = self._rng
        user = f"u{int(rng.paretovariate(0.6)) % (USERS * self.partitions)}"
        home = self._homes.setdefault(user, rng.randrange(self.partitions))
        ts_ms = FIRST_MS + 10 * len(self._history) + rng.randrange(2000)
        event = {"user_id": user, "item_id": f"item-{rng.randrange(100)}", "action": rng.choice(ACTIONS)}
        value = msgspec.json.encode(event | {"ts_ms": ts_ms})
        return home, user.encode(), rng.choice(INVALID) if rng.random() < INVALID_FRACTION else value

    async def add_partition(self) -> None:
        """Add a partition to the events topic; users that are new from now on may live there."""
        async with self.admin() as admin:
            await admin.create_partitions({EVENTS: NewPartitions(self.partitions + 1, [[self.broker_id]])})
        while len(await self._producer.partitions_for(EVENTS)) <= self.partitions:
            await self._producer.client.force_metadata_update()
        self.partitions += 1

    async def replace_broker(self) -> None:
        """Start a broker with a new id, move all partitions of the old one to it, and stop the old one for good."""
        old, old_id = self.broker, self.broker_id
        self.broker_id += 1
        self.broker = self._make_broker()
        await asyncio.to_thread(self.broker.start)
        async with self.admin() as admin:
            await move_partitions(admin, old_id, self.broker_id)
        await asyncio.to_thread(old.stop)

    async def truncate(self) -> None:
        """Delete the records that the group has committed from the events topic."""
        await self.absorb()
        async with self.admin() as admin:
            committed = await admin.list_consumer_group_offsets(GROUP)
            deleted = {
                partition: RecordsToDelete(each.offset) for partition, each in committed.items() if each.offset > 0
            }
            if deleted:
                await admin.delete_records(deleted)
        self.is_truncated = True

    async def absorb(self) -> None:
        """Read what was produced since the last call, before anything may delete it."""
        begins = {TopicPartition(EVENTS, number): self._absorbed.get(number, 0) for number in range(self.partitions)}
        for record in await read_to_end(self.kafka.bootstrap, begins):
            self._history[record.partition, record.offset] = record
            self._absorbed[record.partition] = record.offset + 1

    async def ends(self) -> dict[TopicPartition, int]:
        """Return one past the last record of each partition of the events topic, markers of transactions left out."""
        await self.absorb()
        return {TopicPartition(EVENTS, number): end for number, end in self._absorbed.items()}

    async def wait_committed(self, ends: dict[TopicPartition, int], timeout_s: float) -> None:
        """Return when the group has committed up to these offsets. TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not await self._has_committed(ends):  # noqa: ASYNC110 - Kafka cannot notify
                await asyncio.sleep(0.1)

    async def check(self) -> tuple[int, dict[str, int]]:
        """Return the number of events, and the faults found: lost, rings_wrong, out_of_order."""
        await self.absorb()
        oracle = Oracle(EVENTS, RING_EVENTS)
        invalid: set[Key] = set()
        for key in sorted(self._history):
            event = decode(self._history[key].value)
            if event is None:
                invalid.add(key)
            else:
                oracle.feed(*key, event)
        slates = [msgspec.json.decode(record.value or b"") for record in await self._read_topic(SLATES)]
        dead = {origin(record) for record in await self._read_topic(DEAD_LETTERS)}
        rings = await self._rings()
        expected = oracle.rings()
        return len(self._history), {
            "lost": len(oracle.lost(slates)) + len(invalid - dead),
            "rings_wrong": sum(rings.get(key) != expected.get(key) for key in rings.keys() | expected.keys()),
            "out_of_order": len(oracle.out_of_order(slates)),
        }

    def logs(self) -> str:
        """Return the ends of the workers' logs."""
        return "\n".join(
            f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self._folder.glob("member-*.log"))
        )

    async def _produce(self) -> None:
        """Send records at a steady rate. One whose fate is unknown after a broker's end may be in the topic, or not."""
        async with self._producer:
            while True:
                partition, key, value = self.event()
                with suppress(KafkaError):
                    await self._producer.send(EVENTS, value, key=key, partition=partition)
                await asyncio.sleep(1 / EVENTS_PER_S)

    async def _has_committed(self, ends: dict[TopicPartition, int]) -> bool:
        try:
            async with self.admin() as admin:
                committed = await admin.list_consumer_group_offsets(GROUP)
        except KafkaError:
            return False
        return all(each in committed and committed[each].offset >= end for each, end in ends.items() if end)

    async def _rings(self) -> dict[str, bytes]:
        async with self.redis() as redis:
            keys = [key async for key in redis.scan_iter("*seq:{u:*", count=1000)]
            values = await redis.mget(keys)
        return {"seq:" + key.decode().partition("seq:")[2]: value for key, value in zip(keys, values, strict=True)}

    async def _read_topic(self, topic: str) -> list[ConsumerRecord]:
        begins = {TopicPartition(topic, number): 0 for number in range(PARTITIONS)}
        return await read_to_end(self.kafka.bootstrap, begins)
