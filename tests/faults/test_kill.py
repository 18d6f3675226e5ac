"""Kill, restart, join, leave: in the end Redis and the output topic are what the oracle says."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from oracle import ACTIONS, DEVICES, Oracle
from redis.asyncio import Redis

PARTITIONS, USERS, EVENTS, CAP = 3, 300, 40_000, 16
POISON = [b"{", b"[]", b'{"user_id": "u1"}', b'{"user_id":"u1","item_id":"i","action":"dance","ts_ms":5}', b"\xff\xfe"]


class Members:
    """`millrace run` processes of one consumer group, with the settings of one test."""

    def __init__(self, kafka: str, valkey: str, names: dict[str, str], logs: Path) -> None:
        settings = {f"MILLRACE__KAFKA__{key}": value for key, value in names.items()}
        settings |= {
            "MILLRACE__KAFKA__BOOTSTRAP_SERVERS": kafka,
            "MILLRACE__KAFKA__SESSION_TIMEOUT_MS": "6000",  # the broker's smallest: a killed member is noticed
            "MILLRACE__KAFKA__MAX_POLL_RECORDS": "200",  # several polls under way when the kill comes
            "MILLRACE__REDIS__URL": valkey,
            "MILLRACE__SEQUENCES__MAX_EVENTS": str(CAP),
            "MILLRACE__EVENTS__MAX_AGE_DAYS": "0",
            "MILLRACE__DEAD_LETTERS__MAX_RATIO": "0.5",
            "MILLRACE__HEALTH__COMMIT_INTERVAL_S": "0.2",
            "MILLRACE__HEALTH__PORT": "0",
        }
        self._env, self._logs, self._started = os.environ | settings, logs, 0
        self.alive: list[subprocess.Popen] = []

    def start(self, **settings: str) -> subprocess.Popen:
        self._started += 1
        env = self._env | {f"MILLRACE__{key}": value for key, value in settings.items()}
        with (self._logs / f"member-{self._started}.log").open("wb") as log:
            command = [sys.executable, "-m", "worker.cli", "run"]
            member = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        self.alive.append(member)
        return member

    def assigned(self) -> bool:
        """Has the newest of them got partitions?"""
        log = self._logs / f"member-{self._started}.log"
        return bool(re.search(r'"partitions": \["[^}]*"event": "partitions assigned"', log.read_text()))

    def kill(self, member: subprocess.Popen) -> None:
        member.kill()
        member.wait(10)
        self.alive.remove(member)

    async def leave(self, member: subprocess.Popen) -> int:
        member.send_signal(signal.SIGTERM)
        self.alive.remove(member)
        return await asyncio.to_thread(member.wait, 60)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """When what happens inside fails, their last words are shown."""
        try:
            yield
        except BaseException:
            print("\n".join(log.read_text()[-3000:] for log in sorted(self._logs.glob("member-*.log"))))
            raise


@pytest.fixture
def names(topics: Callable[[str], str]) -> dict[str, str]:
    parts = {
        "EVENTS_TOPIC": "events",
        "RECOMMENDATIONS_TOPIC": "slates",
        "DEAD_LETTER_TOPIC": "dead",
        "GROUP_ID": "group",
    }
    return {key: topics(name) for key, name in parts.items()}


@pytest.fixture
def members(kafka: str, valkey: str, names: dict[str, str], tmp_path: Path):
    members = Members(kafka, valkey, names, tmp_path)
    yield members
    for member in list(members.alive):
        members.kill(member)


def some_event(random: random.Random, prefix: str, number: int) -> dict:
    event = {
        "user_id": f"{prefix}{int(random.paretovariate(0.6)) % USERS}",
        "item_id": f"item-{int(random.paretovariate(0.5)) % 500}",
        "action": random.choice(ACTIONS),
        "ts_ms": 1_700_000_000_000 + 250 * number + random.randrange(-2000, 2000),  # out of order, too
    }
    extras = {"value": 9.5, "dwell_ms": 12_345, "device": random.choice(DEVICES), "position": 3, "context": {"a": "b"}}
    return event | {key: value for key, value in extras.items() if random.random() < 0.3}


async def create(kafka: str, names: dict[str, str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    wanted = [names[key] for key in ("EVENTS_TOPIC", "RECOMMENDATIONS_TOPIC", "DEAD_LETTER_TOPIC")]
    await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in wanted])
    await admin.close()


async def produce(kafka: str, topic: str, prefix: str, count: int = EVENTS, pause_s: float = 0.25) -> None:
    """Valid events, some twice, and some poison; trickled so that every kill happens in mid-stream."""
    dice = random.Random(11)
    async with AIOKafkaProducer(bootstrap_servers=kafka, enable_idempotence=True, linger_ms=5) as producer:
        for number in range(count):
            event = some_event(dice, prefix, number)
            key, value = event["user_id"].encode(), msgspec.json.encode(event)
            if dice.random() < 0.02:
                value = dice.choice(POISON)
            for _ in range(2 if dice.random() < 0.02 else 1):
                await producer.send(topic, value, key=key)
            if number % 100 == 99:
                await asyncio.sleep(pause_s)


async def read_all(kafka: str, topic: str) -> list:
    """Every committed record of a topic, by partition in offset order."""
    # Not `seek_to_beginning`: the consumer's own reset to the latest may still be under way, and then wins.
    whole = {"isolation_level": "read_committed", "auto_offset_reset": "earliest"}
    async with AIOKafkaConsumer(bootstrap_servers=kafka, **whole) as consumer:
        parts = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(parts)
        ends = await consumer.end_offsets(parts)
        records = []
        while any([await consumer.position(part) < ends[part] for part in parts]):
            for polled in (await consumer.getmany(timeout_ms=500)).values():
                records += polled
    return sorted(records, key=lambda record: (record.partition, record.offset))


@asynccontextmanager
async def settled(kafka: str, names: dict[str, str]) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """A condition: the group has committed the end of every partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    parts = [TopicPartition(names["EVENTS_TOPIC"], number) for number in range(PARTITIONS)]
    async with AIOKafkaConsumer(bootstrap_servers=kafka) as consumer:

        async def condition() -> bool:
            ends = await consumer.end_offsets(parts)
            committed = await admin.list_consumer_group_offsets(names["GROUP_ID"])
            return all(part in committed and committed[part].offset >= ends[part] for part in parts)

        await admin.start()
        try:
            yield condition
        finally:
            await admin.close()


def decoded(value: bytes) -> dict | None:
    """The event in a record, or None for what must have become a dead letter."""
    try:
        event = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return None
    return event if isinstance(event, dict) and event.get("action") in ACTIONS else None


def test_nothing_is_lost_when_workers_are_killed_and_members_come_and_go(
    run, kafka: str, valkey: str, names: dict[str, str], members: Members, eventually, tmp_path: Path
):
    prefix = f"{names['GROUP_ID']}-"

    async def slates() -> int:
        return len(await read_all(kafka, names["RECOMMENDATIONS_TOPIC"]))

    async def answered(more: int) -> None:
        enough = await slates() + more

        async def condition() -> bool:
            return await slates() >= enough

        await eventually(condition, 60)

    async def story() -> None:
        await create(kafka, names)
        producing = asyncio.create_task(produce(kafka, names["EVENTS_TOPIC"], prefix))
        first = members.start()
        for more in (200, 400):
            await answered(more)
            members.kill(first)
            first = members.start()
        await eventually(members.assigned, 60)
        second = members.start()
        await eventually(members.assigned, 60)
        await answered(200)
        assert await members.leave(second) == 0
        await answered(200)
        assert not producing.done(), "all of it must happen in mid-stream"
        producing.cancel()
        await asyncio.wait({producing})
        async with settled(kafka, names) as condition:
            await eventually(condition, 90)
        assert await members.leave(first) == 0

    with members.heard():
        run(story(), 240)
    run(compare(kafka, valkey, names, prefix), 60)


def test_events_that_ask_for_no_slate_reach_their_rings_and_are_committed(
    run, kafka: str, valkey: str, names: dict[str, str], members: Members, eventually
):
    prefix = f"{names['GROUP_ID']}-"

    async def answered() -> bool:
        return bool(await read_all(kafka, names["RECOMMENDATIONS_TOPIC"]))

    async def story() -> None:
        await create(kafka, names)
        await produce(kafka, names["EVENTS_TOPIC"], prefix, 2000, pause_s=0)
        member = members.start(EVENTS__TRIGGER_ACTIONS='["cart"]')
        await eventually(answered, 60)
        members.kill(member)
        member = members.start(EVENTS__TRIGGER_ACTIONS='["cart"]')
        async with settled(kafka, names) as condition:
            await eventually(condition, 60)
        assert await members.leave(member) == 0

    with members.heard():
        run(story(), 150)
    run(compare(kafka, valkey, names, prefix, ("cart",)), 60)


async def compare(
    kafka: str, valkey: str, names: dict[str, str], prefix: str, triggers: tuple[str, ...] = ACTIONS
) -> None:
    oracle, poison = Oracle(names["EVENTS_TOPIC"], CAP, triggers=triggers), set()
    for record in await read_all(kafka, names["EVENTS_TOPIC"]):
        if (event := decoded(record.value)) is None:
            poison.add((record.partition, record.offset, record.value))
        else:
            oracle.feed(record.partition, record.offset, event)
    async with Redis.from_url(valkey) as redis:
        keys = [key async for key in redis.scan_iter(f"seq:{{u:{prefix}*", count=1000)]
        stored = dict(zip([key.decode() for key in keys], await redis.mget(keys), strict=True))
    assert stored == oracle.rings()
    oracle.check_slates(
        [msgspec.json.decode(record.value) for record in await read_all(kafka, names["RECOMMENDATIONS_TOPIC"])]
    )
    buried = {_origin(record) for record in await read_all(kafka, names["DEAD_LETTER_TOPIC"])}
    assert buried == poison


def _origin(record) -> tuple[int, int, bytes]:
    headers = dict(record.headers)
    return int(headers["millrace-partition"]), int(headers["millrace-offset"]), record.value
