"""Kill, restart, join, leave: in the end Redis and the recommendations topic are what the oracle computes."""

import asyncio
import random
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from oracle import ACTIONS, DEVICES, Oracle
from redis.asyncio import Redis

from tests.faults.processes import launch
from tests.faults.topics import decode, origin, read_to_end

PARTITIONS = 3
USERS = 300
EVENTS = 100_000  # in bursts for four minutes: more than any test consumes
BURST_EVENTS = 400  # a member is killed while it answers a burst, with hundreds of events in flight
RING_EVENTS = 16
INVALID = [b"{", b"[]", b'{"user_id": "u1"}', b'{"user_id":"u1","item_id":"i","action":"dance","ts_ms":5}', b"\xff\xfe"]
Condition = Callable[[], Awaitable[bool]]
Eventually = Callable[..., Awaitable[Any]]


class Members:
    """`millrace run` processes of one consumer group."""

    def __init__(self, settings: dict[str, str], logs: Path) -> None:
        self._settings = settings
        self._logs = logs
        self._started = 0
        self.alive: list[subprocess.Popen] = []

    def start(self, **settings: str) -> subprocess.Popen:
        self._started += 1
        member = launch(self._newest_log, **(self._settings | settings))
        self.alive.append(member)
        return member

    def newest_has_partitions(self) -> bool:
        assigned = r'"partitions": \["[^}]*"event": "partitions assigned"'
        return bool(re.search(assigned, self._newest_log.read_text()))

    def kill(self, member: subprocess.Popen) -> None:
        member.kill()
        member.wait(10)
        self.alive.remove(member)

    async def leave(self, member: subprocess.Popen) -> int:
        member.send_signal(signal.SIGTERM)
        self.alive.remove(member)
        return await asyncio.to_thread(member.wait, 60)

    def print_logs(self) -> None:
        print("\n".join(log.read_text()[-3000:] for log in sorted(self._logs.glob("member-*.log"))))

    @property
    def _newest_log(self) -> Path:
        return self._logs / f"member-{self._started}.log"


class Stream:
    """The topics and the consumer group of a test, seen from outside the workers."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.bootstrap = settings["KAFKA__BOOTSTRAP_SERVERS"]
        self.group = settings["KAFKA__GROUP_ID"]
        self.events = settings["KAFKA__EVENTS_TOPIC"]
        self.slates = settings["KAFKA__RECOMMENDATIONS_TOPIC"]
        self.dead_letters = settings["KAFKA__DEAD_LETTER_TOPIC"]
        self.user_prefix = f"{self.group}-"

    async def create(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        names = (self.events, self.slates, self.dead_letters)
        await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names])
        await admin.close()

    async def produce(self, count: int = EVENTS, pause_s: float = 1.0) -> None:
        """Send valid events, some twice, and some invalid records, with a pause after every burst."""
        rng = random.Random(11)
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap, enable_idempotence=True, linger_ms=5) as producer:
            for number in range(count):
                event = random_event(rng, self.user_prefix, number)
                key = event["user_id"].encode()
                value = rng.choice(INVALID) if rng.random() < 0.02 else msgspec.json.encode(event)
                for _ in range(2 if rng.random() < 0.02 else 1):
                    await producer.send(self.events, value, key=key)
                if number % BURST_EVENTS == BURST_EVENTS - 1:
                    await asyncio.sleep(pause_s)

    async def read(self, topic: str) -> list[ConsumerRecord]:
        """Return every record of a topic, by partition in offset order."""
        return await read_to_end(self.bootstrap, dict.fromkeys(self._partitions(topic), 0))

    @asynccontextmanager
    async def slate_counter(self) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        """Yield a function that returns the number of slates in the topic."""
        async with AIOKafkaConsumer(bootstrap_servers=self.bootstrap) as consumer:

            async def count() -> int:
                return sum((await consumer.end_offsets(self._partitions(self.slates))).values())

            yield count

    @asynccontextmanager
    async def all_committed(self) -> AsyncIterator[Condition]:
        """Yield a condition: the group has committed the end of every partition."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        partitions = self._partitions(self.events)
        async with AIOKafkaConsumer(bootstrap_servers=self.bootstrap) as consumer:

            async def condition() -> bool:
                ends = await consumer.end_offsets(partitions)
                committed = await admin.list_consumer_group_offsets(self.group)
                return all(each in committed and committed[each].offset >= ends[each] for each in partitions)

            await admin.start()
            try:
                yield condition
            finally:
                await admin.close()

    def _partitions(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(PARTITIONS)]


def random_event(rng: random.Random, prefix: str, number: int) -> dict[str, Any]:
    event = {
        "user_id": f"{prefix}{int(rng.paretovariate(0.6)) % USERS}",
        "item_id": f"item-{int(rng.paretovariate(0.5)) % 500}",
        "action": rng.choice(ACTIONS),
        "ts_ms": 1_700_000_000_000 + 250 * number + rng.randrange(-2000, 2000),  # out of order, too
    }
    optional = {"value": 9.5, "dwell_ms": 12_345, "device": rng.choice(DEVICES), "position": 3, "context": {"a": "b"}}
    return event | {key: value for key, value in optional.items() if rng.random() < 0.3}


@pytest.fixture
def settings(deployment: dict[str, str], valkey: str) -> dict[str, str]:
    return deployment | {
        "KAFKA__SESSION_TIMEOUT_MS": "6000",  # the smallest that the broker allows, to detect killed members
        "KAFKA__MAX_POLL_RECORDS": "200",  # several polls are pending at every kill
        "REDIS__URL": valkey,
        "SEQUENCES__MAX_EVENTS": str(RING_EVENTS),
        "EVENTS__MAX_AGE_DAYS": "0",
        "DEAD_LETTERS__MAX_RATIO": "0.5",
        "HEALTH__COMMIT_INTERVAL_S": "0.05",  # a commit of unanswered events would be out before the kill
    }


@pytest.fixture
def stream(settings: dict[str, str]) -> Stream:
    return Stream(settings)


@pytest.fixture
def members(settings: dict[str, str], tmp_path: Path) -> Iterator[Members]:
    members = Members(settings, tmp_path)
    yield members
    members.print_logs()  # pytest shows them if the test failed
    for member in list(members.alive):
        members.kill(member)


async def test_nothing_is_lost_while_members_are_killed_join_and_leave(
    stream: Stream, members: Members, valkey: str, eventually: Eventually
) -> None:
    await stream.create()
    async with stream.slate_counter() as count_slates, stream.all_committed() as all_committed:

        async def wait_for_slates(more: int) -> None:
            enough = await count_slates() + more

            async def condition() -> bool:
                return await count_slates() >= enough

            await eventually(condition, 60)

        producing = asyncio.create_task(stream.produce())
        first = members.start()
        for more in (200, 400):
            await wait_for_slates(more)
            members.kill(first)
            first = members.start()
        await eventually(members.newest_has_partitions, 60)
        second = members.start()
        await eventually(members.newest_has_partitions, 60)
        await wait_for_slates(200)
        assert await members.leave(second) == 0
        await wait_for_slates(200)
        assert not producing.done(), "all of it must happen while events arrive"
        producing.cancel()
        await asyncio.wait({producing})
        await eventually(all_committed, 90)
    assert await members.leave(first) == 0
    await check_against_oracle(stream, valkey)


async def test_events_without_a_trigger_action_reach_their_rings_and_are_committed(
    stream: Stream, members: Members, valkey: str, eventually: Eventually
) -> None:
    await stream.create()
    await stream.produce(2000, pause_s=0)
    async with stream.slate_counter() as count_slates, stream.all_committed() as all_committed:
        member = members.start(EVENTS__TRIGGER_ACTIONS='["cart"]')
        await eventually(count_slates, 60)
        members.kill(member)
        member = members.start(EVENTS__TRIGGER_ACTIONS='["cart"]')
        await eventually(all_committed, 60)
    assert await members.leave(member) == 0
    await check_against_oracle(stream, valkey, triggers=("cart",))


async def check_against_oracle(stream: Stream, valkey: str, triggers: tuple[str, ...] = ACTIONS) -> None:
    oracle = Oracle(stream.events, RING_EVENTS, triggers=triggers)
    invalid: set[tuple[int, int, bytes | None]] = set()
    for record in await stream.read(stream.events):
        if (event := decode(record.value)) is None:
            invalid.add((record.partition, record.offset, record.value))
        else:
            oracle.feed(record.partition, record.offset, event)
    async with Redis.from_url(valkey) as redis:
        keys = [key async for key in redis.scan_iter(f"{stream.group}:seq:*", count=1000)]
        rings = dict(zip([key.decode() for key in keys], await redis.mget(keys), strict=True))
    assert rings == oracle.rings(f"{stream.group}:")
    oracle.check_slates([msgspec.json.decode(record.value or b"") for record in await stream.read(stream.slates)])
    dead_letters = {(*origin(record), record.value) for record in await stream.read(stream.dead_letters)}
    assert dead_letters == invalid
