"""Rings in a real Valkey against a plain model of DESIGN's words, byte for byte; replays, losses, migrations."""

import asyncio
import itertools
import struct
from collections.abc import Awaitable, Callable
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.records import Event
from worker.config import RedisConfig
from worker.config import SequencesConfig as Config
from worker.errors import StoreError, TopicRecreated
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.redis.client import RedisClient, connect
from worker.redis.ring import MAX_COUNT, Ring
from worker.redis.sequences import SequenceStore

PARTITIONS = [Partition("events", number) for number in range(3)]
END = 1_000_000
names = (f"user{number}" for number in itertools.count())


def event_bytes(partition: int, offset: int) -> bytes:
    return blake2b(f"{partition} {offset}".encode(), digest_size=24).digest()


def consumed(user: str, partition: int, offset: int, end_offset: int = END) -> ConsumedEvent:
    record_offset = RecordOffset(PARTITIONS[partition], 1, offset)
    return ConsumedEvent(Event(user, "i", "view", 1), event_bytes(partition, offset), record_offset, end_offset, 0, 0.0)


def source(partition: int, epoch: str = "1") -> bytes:
    return blake2b(f"{epoch}\0events\0{partition}".encode(), digest_size=8).digest()


class Model:
    """A list of events and two pairs, most recently used first."""

    def __init__(self) -> None:
        self.cap, self.count, self.kept = 0, 0, []
        self.pairs: list[tuple[bytes, int]] = [(bytes(8), 0), (bytes(8), 0)]

    def push(self, partition: int, offset: int, cap: int) -> bool:
        name = source(partition)
        if offset <= dict(self.pairs).get(name, -1):
            return False
        if self.cap not in (0, cap):
            self.kept = self.kept[-cap:]
            self.count = self.count if len(self.kept) == cap else len(self.kept)
        others = [pair for pair in self.pairs if pair[0] != name]
        self.pairs = [(name, offset), others[0]]
        self.cap, self.count, self.kept = cap, self.count + 1, [*self.kept, event_bytes(partition, offset)][-cap:]
        return True

    @property
    def ring(self) -> bytes:
        return b"".join(self.kept)

    def value(self) -> bytes:
        slots = [b""] * len(self.kept)
        for age, event in enumerate(reversed(self.kept)):
            slots[(self.count - 1 - age) % self.cap] = event
        pairs = b"".join(name + struct.pack("<q", last) for name, last in self.pairs)
        return struct.pack("<BBHI", 1, 24, self.cap, self.count) + pairs + b"".join(slots)


with_redis = Callable[[RedisClient], Awaitable[None]]


@pytest.fixture
def redis(valkey: str) -> Callable[[with_redis], None]:
    """Runs a test's coroutine with a client of its own."""

    async def within(test: with_redis) -> None:
        client = await connect(RedisConfig(url=valkey))
        try:
            await test(client)
        finally:
            await client.aclose()

    return lambda test: asyncio.run(asyncio.wait_for(within(test), 60))


events = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 40))  # user, partition, offset
steps = st.one_of(
    st.lists(events, min_size=1, max_size=12).map(lambda batch: ("push", sorted(batch, key=lambda e: e[2]))),
    st.lists(events, min_size=1, max_size=12).map(lambda batch: ("push", batch)),
    st.integers(0, 2).map(lambda partition: ("forget", partition)),
    st.sampled_from([1, 2, 5, 8]).map(lambda cap: ("cap", cap)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(steps, min_size=1, max_size=12), cache=st.booleans())
def test_rings_equal_the_model_byte_for_byte_whatever_comes(redis, plan: list, cache: bool):
    async def scenario(client: RedisClient) -> None:
        users = [next(names) for _ in range(3)]
        models = {user: Model() for user in users}
        sequences, cap = SequenceStore(client, Config(max_events=5)), 5
        for step, what in plan:
            if step == "cap":
                sequences, cap = SequenceStore(client, Config(max_events=what)), what
            elif step == "forget":
                sequences.forget(PARTITIONS[what])
            else:
                batch = [consumed(users[user], partition, offset) for user, partition, offset in what]
                await sequences.push(batch)
                for each, (_, partition, offset) in zip(batch, what, strict=True):
                    model = models[each.event.user_id]
                    assert each.is_new == model.push(partition, offset, cap)
                    assert each.ring == model.ring
            if not cache:
                for partition in PARTITIONS:
                    sequences.forget(partition)
        for user, model in models.items():
            assert await client.call("GET", f"seq:{{u:{user}}}") == (model.value() if model.count else None)

    redis(scenario)


def test_a_ring_goes_through_its_stored_form_unchanged():
    ring = Ring(4)
    for offset in range(11):
        ring.push(source(0), offset, event_bytes(0, offset), 4)
        assert Ring.from_value(ring.value(), 4) == ring


def test_another_process_changes_a_ring_and_the_next_push_here_sees_it(redis):
    async def scenario(client: RedisClient) -> None:
        one, other, user = SequenceStore(client, Config()), SequenceStore(client, Config()), next(names)
        await one.push([consumed(user, 0, 1)])
        await other.push([consumed(user, 1, 7)])
        mine = consumed(user, 0, 2)
        await one.push([mine])
        assert mine.ring == event_bytes(0, 1) + event_bytes(1, 7) + event_bytes(0, 2)

    redis(scenario)


def test_a_replay_changes_nothing_and_says_so(redis):
    async def scenario(client: RedisClient) -> None:
        user = next(names)
        await SequenceStore(client, Config()).push([consumed(user, 0, offset) for offset in range(5)])
        before = await client.call("GET", f"seq:{{u:{user}}}")
        again = [consumed(user, 0, offset) for offset in range(3)]
        await SequenceStore(client, Config()).push(again)
        assert [each.is_new for each in again] == [False] * 3
        assert await client.call("GET", f"seq:{{u:{user}}}") == before
        assert all(each.ring == before[40:] for each in again)

    redis(scenario)


def test_a_recreated_topic_is_refused_until_the_topic_generation_changes(redis):
    async def scenario(client: RedisClient) -> None:
        user, bystander = next(names), next(names)
        await SequenceStore(client, Config()).push([consumed(user, 0, 500)])
        batch = [consumed(user, 0, 3, end_offset=4), consumed(bystander, 0, 2, end_offset=4)]
        with pytest.raises(TopicRecreated, match=r"sequences\.topic_generation"):
            await SequenceStore(client, Config()).push(batch)
        await SequenceStore(client, Config(topic_generation="2")).push(batch)
        assert batch[0].ring == event_bytes(0, 500) + event_bytes(0, 3)

    redis(scenario)


def test_rings_expire_and_every_push_puts_that_off(redis):
    async def scenario(client: RedisClient) -> None:
        user = next(names)
        await SequenceStore(client, Config(ttl_days=2)).push([consumed(user, 0, 1)])
        assert 172_000 < await client.call("TTL", f"seq:{{u:{user}}}") <= 172_800
        await SequenceStore(client, Config(ttl_days=4)).push([consumed(user, 0, 2)])
        assert 345_000 < await client.call("TTL", f"seq:{{u:{user}}}") <= 345_600

    redis(scenario)


@pytest.mark.parametrize("value", [b"\x02\x18" + bytes(38), b"short", b"\x01\x20" + bytes(62)])
def test_a_value_of_another_format_is_refused_by_name_and_left_alone(redis, value: bytes):
    async def scenario(client: RedisClient) -> None:
        user = next(names)
        await client.call("SET", f"seq:{{u:{user}}}", value)
        with pytest.raises(StoreError, match=r"format"):
            await SequenceStore(client, Config()).push([consumed(user, 0, 1)])
        assert await client.call("GET", f"seq:{{u:{user}}}") == value

    redis(scenario)


def test_a_key_of_another_type_is_refused(redis):
    async def scenario(client: RedisClient) -> None:
        user = next(names)
        await client.call("LPUSH", f"seq:{{u:{user}}}", "x")
        with pytest.raises(StoreError, match="WRONGTYPE"):
            await SequenceStore(client, Config()).push([consumed(user, 0, 1)])

    redis(scenario)


def test_a_lost_ring_is_counted_and_the_push_goes_on_from_what_is_there(redis):
    async def scenario(client: RedisClient) -> None:
        user, sequences = next(names), SequenceStore(client, Config())
        await sequences.push([consumed(user, 0, 1)])
        await client.call("DEL", f"seq:{{u:{user}}}")
        after = consumed(user, 0, 2)
        await sequences.push([after])
        assert (after.ring, after.is_new, sequences.rings_lost) == (event_bytes(0, 2), True, 1)

    redis(scenario)


def test_a_rebuild_drops_each_ring_once_and_then_appends(redis):
    async def scenario(client: RedisClient) -> None:
        user = next(names)
        await SequenceStore(client, Config()).push([consumed(user, 1, 70)])
        sequences = SequenceStore(client, Config(), rebuild=True)
        for offset in (3, 4):
            await sequences.push([consumed(user, 0, offset)])
        value = await client.call("GET", f"seq:{{u:{user}}}")
        assert value[40:] == event_bytes(0, 3) + event_bytes(0, 4)
        assert sequences.rings_lost == 0

    redis(scenario)


def test_the_count_goes_around_without_moving_an_event(redis):
    async def scenario(client: RedisClient) -> None:
        user, cap = next(names), 7
        ring = Ring(cap, MAX_COUNT - 3, source(0), 9, bytes(8), 0, b"".join(event_bytes(0, o) for o in range(3, 10)))
        await client.call("SET", f"seq:{{u:{user}}}", ring.value())
        sequences = SequenceStore(client, Config(max_events=cap))
        await sequences.push([consumed(user, 0, offset) for offset in range(10, 15)])
        expected = b"".join(event_bytes(0, offset) for offset in range(8, 15))
        value = await client.call("GET", f"seq:{{u:{user}}}")
        assert Ring.from_value(value, cap).events == expected
        assert Ring.from_value(value, cap).count < MAX_COUNT
        last = consumed(user, 0, 15)
        await sequences.push([last])
        assert last.ring == expected[24:] + event_bytes(0, 15)

    redis(scenario)


def test_the_cache_keeps_to_its_bound_and_forgets_a_partition(redis):
    async def scenario(client: RedisClient) -> None:
        sequences = SequenceStore(client, Config(cache_mib=1))
        users = [next(names) for _ in range(3000)]
        await sequences.push([consumed(user, number % 2, 1) for number, user in enumerate(users)])
        cache = sequences._cache
        assert 1500 < len(cache) < 3000
        assert cache.bytes <= 1 << 20
        sequences.forget(PARTITIONS[0])
        sequences.forget(PARTITIONS[1])
        assert (len(cache), cache.bytes) == (0, 0)

    redis(scenario)
