"""Rings in a real Valkey against a plain Python model, byte for byte; replays, losses, migrations."""

import struct
from collections.abc import Awaitable, Callable
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.records import Event
from worker.config import SequencesConfig
from worker.errors import StoreError, StoreUnavailable, TopicRecreated
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.redis.client import RedisClient
from worker.redis.rings.ring import MAX_COUNT, Ring
from worker.redis.rings.sequences import SequenceStore

PARTITIONS = [Partition("events", number) for number in range(3)]
END = 1_000_000

NewUser = Callable[[], str]


def event_bytes(partition: int, offset: int) -> bytes:
    return blake2b(f"{partition} {offset}".encode(), digest_size=24).digest()


def consumed_event(user: str, partition: int, offset: int, end_offset: int = END) -> ConsumedEvent:
    return ConsumedEvent(
        event=Event(user, "i", "view", 1),
        packed=event_bytes(partition, offset),
        record_offset=RecordOffset(PARTITIONS[partition], 1, offset),
        end_offset=end_offset,
        polled_ms=0,
        polled_s=0.0,
    )


def source(partition: int, topic_generation: str = "1") -> bytes:
    return blake2b(f"{topic_generation}\0events\0{partition}".encode(), digest_size=8).digest()


async def read_value(client: RedisClient, user: str) -> bytes | None:
    return await client.call("GET", f"seq:{{u:{user}}}")


class ReferenceRing:
    """A list of events, and two (source, last offset) pairs, the most recently used first."""

    def __init__(self) -> None:
        self.cap = 0
        self.count = 0
        self.events: list[bytes] = []
        self.pairs: list[tuple[bytes, int]] = [(bytes(8), 0), (bytes(8), 0)]

    def push(self, partition: int, offset: int, cap: int) -> bool:
        name = source(partition)
        if offset <= dict(self.pairs).get(name, -1):
            return False
        if self.cap not in (0, cap):
            self.events = self.events[-cap:]
            self.count = self.count if len(self.events) == cap else len(self.events)
        others = [pair for pair in self.pairs if pair[0] != name]
        self.pairs = [(name, offset), others[0]]
        self.cap = cap
        self.count += 1
        self.events = [*self.events, event_bytes(partition, offset)][-cap:]
        return True

    @property
    def ring(self) -> bytes:
        return b"".join(self.events)

    def value(self) -> bytes:
        slots = [b""] * len(self.events)
        for age, event in enumerate(reversed(self.events)):
            slots[(self.count - 1 - age) % self.cap] = event
        pairs = b"".join(name + struct.pack("<q", last) for name, last in self.pairs)
        return struct.pack("<BBHI", 1, 24, self.cap, self.count) + pairs + b"".join(slots)


events = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 40))  # user, partition, offset
steps = st.one_of(
    st.lists(events, min_size=1, max_size=12).map(lambda batch: ("push", sorted(batch, key=lambda e: e[2]))),
    st.lists(events, min_size=1, max_size=12).map(lambda batch: ("push", batch)),
    st.integers(0, 2).map(lambda partition: ("forget", partition)),
    st.sampled_from([1, 2, 5, 8]).map(lambda cap: ("cap", cap)),
)


async def check_against_reference(client: RedisClient, users: list[str], plan: list, cached: bool) -> None:
    """Run the plan's steps with a store and with reference rings; compare every result and the stored bytes."""
    references = {user: ReferenceRing() for user in users}
    cap = 5
    store = SequenceStore(client, SequencesConfig(max_events=cap))
    for step, value in plan:
        if step == "cap":
            cap = value
            store = SequenceStore(client, SequencesConfig(max_events=cap))
        elif step == "forget":
            store.forget(PARTITIONS[value])
        else:
            batch = [consumed_event(users[user], partition, offset) for user, partition, offset in value]
            await store.push(batch)
            for event, (_, partition, offset) in zip(batch, value, strict=True):
                reference = references[event.event.user_id]
                assert event.is_new == reference.push(partition, offset, cap)
                assert event.ring == reference.ring
        if not cached:
            for partition in PARTITIONS:
                store.forget(partition)
    for user, reference in references.items():
        stored = await read_value(client, user)
        assert stored == (reference.value() if reference.count else None)
        if ring := store._cache.get(user):
            assert ring.value() == stored


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(plan=st.lists(steps, min_size=1, max_size=12), cached=st.booleans())
async def test_rings_equal_the_reference_byte_for_byte(
    client: RedisClient, new_user: NewUser, plan: list, cached: bool
):
    users = [new_user() for _ in range(3)]
    await check_against_reference(client, users, plan, cached)


def test_ring_is_restored_from_its_stored_value():
    ring = Ring(4)
    for offset in range(11):
        ring.push(source(0), offset, event_bytes(0, offset), 4)
        assert Ring.from_value(ring.value(), 4) == ring


async def test_push_sees_events_that_another_process_appended(client: RedisClient, new_user: NewUser):
    here = SequenceStore(client, SequencesConfig())
    there = SequenceStore(client, SequencesConfig())
    user = new_user()
    await here.push([consumed_event(user, 0, 1)])
    await there.push([consumed_event(user, 1, 7)])
    event = consumed_event(user, 0, 2)
    await here.push([event])
    assert event.ring == event_bytes(0, 1) + event_bytes(1, 7) + event_bytes(0, 2)


async def test_replayed_events_change_nothing_and_are_not_new(client: RedisClient, new_user: NewUser):
    user = new_user()
    await SequenceStore(client, SequencesConfig()).push([consumed_event(user, 0, offset) for offset in range(5)])
    before = await read_value(client, user)
    assert before
    replayed = [consumed_event(user, 0, offset) for offset in range(3)]
    await SequenceStore(client, SequencesConfig()).push(replayed)
    assert [event.is_new for event in replayed] == [False] * 3
    assert await read_value(client, user) == before
    assert all(event.ring == before[40:] for event in replayed)


async def test_recreated_topic_is_rejected_until_the_topic_generation_changes(client: RedisClient, new_user: NewUser):
    user = new_user()
    await SequenceStore(client, SequencesConfig()).push([consumed_event(user, 0, 500)])
    batch = [consumed_event(user, 0, 3, end_offset=4), consumed_event(new_user(), 0, 2, end_offset=4)]
    with pytest.raises(TopicRecreated, match=r"sequences\.topic_generation"):
        await SequenceStore(client, SequencesConfig()).push(batch)
    await SequenceStore(client, SequencesConfig(topic_generation="2")).push(batch)
    assert batch[0].ring == event_bytes(0, 500) + event_bytes(0, 3)


async def test_worker_that_stood_still_while_another_read_further_finds_its_events_pushed(
    client: RedisClient, new_user: NewUser
):
    """What it polled before gives the partition's end as it was then: the offset in Redis lies beyond that."""
    user = new_user()
    behind, ahead = SequenceStore(client, SequencesConfig()), SequenceStore(client, SequencesConfig())
    behind.ask_end = ahead.ask_end = answer_end(9)
    await behind.push([consumed_event(user, 0, offset, end_offset=4) for offset in range(2)])
    await ahead.push([consumed_event(user, 0, offset, end_offset=9) for offset in range(9)])
    bystander = new_user()
    late = [consumed_event(user, 0, 2, end_offset=4), consumed_event(bystander, 0, 3, end_offset=4)]
    await behind.push(late)
    assert [event.is_new for event in late] == [False, True]
    assert late[0].ring == b"".join(event_bytes(0, offset) for offset in range(9))
    assert (await read_value(client, user) or b"")[40:] == late[0].ring


async def test_offset_beyond_the_partition_as_it_is_now_means_a_topic_that_was_recreated(
    client: RedisClient, new_user: NewUser
):
    user = new_user()
    await SequenceStore(client, SequencesConfig()).push([consumed_event(user, 0, 500)])
    store = SequenceStore(client, SequencesConfig())
    store.ask_end = answer_end(500)
    with pytest.raises(TopicRecreated, match=r"up to offset 500, but the partition ends at 4"):
        await store.push([consumed_event(user, 0, 3, end_offset=4)])


def answer_end(offset: int) -> Callable[[Partition], Awaitable[int]]:
    async def answer(partition: Partition) -> int:
        return offset

    return answer


async def test_every_push_renews_the_expiry_of_a_ring(client: RedisClient, new_user: NewUser):
    user = new_user()
    await SequenceStore(client, SequencesConfig(ttl_days=2)).push([consumed_event(user, 0, 1)])
    assert 172_000 < await client.call("TTL", f"seq:{{u:{user}}}") <= 172_800
    await SequenceStore(client, SequencesConfig(ttl_days=4)).push([consumed_event(user, 0, 2)])
    assert 345_000 < await client.call("TTL", f"seq:{{u:{user}}}") <= 345_600


@pytest.mark.parametrize(
    "value", [b"\x02\x18" + bytes(38), b"\x01\x20" + bytes(62)], ids=["format 2", "32-byte events"]
)
async def test_ring_of_another_version_is_rejected_and_left_unchanged(
    client: RedisClient, new_user: NewUser, value: bytes
):
    user = new_user()
    await client.call("SET", f"seq:{{u:{user}}}", value)
    with pytest.raises(StoreError, match=r"format") as caught:
        await SequenceStore(client, SequencesConfig()).push([consumed_event(user, 0, 1)])
    assert not caught.value.retriable
    assert await read_value(client, user) == value


RING_OF_TWO = Ring(4, 2, source(0), 9, events=bytes(48)).value()


@pytest.mark.parametrize(
    "write",
    [
        ("LPUSH", "x"),
        ("SET", "short"),
        ("SET", "a text that is longer than the header of a ring is"),
        ("SET", RING_OF_TWO[:2] + bytes(2) + RING_OF_TWO[4:]),
        ("SET", RING_OF_TWO[:-1]),
    ],
    ids=["list", "short text", "long text", "no room", "cut"],
)
async def test_key_that_holds_no_ring_is_renamed_and_the_ring_starts_again(
    client: RedisClient, new_user: NewUser, write: tuple[str, str | bytes]
):
    command, value = write
    user, healthy = new_user(), new_user()
    await client.call(command, f"seq:{{u:{user}}}", value)
    store = SequenceStore(client, SequencesConfig())
    events = [consumed_event(healthy, 0, 1), consumed_event(user, 0, 2), consumed_event(user, 0, 3)]
    with pytest.raises(StoreUnavailable, match="held no ring"):
        await store.push(events)
    await store.push(events)
    assert [event.is_new for event in events] == [True] * 3
    assert (events[0].ring, events[2].ring) == (event_bytes(0, 1), event_bytes(0, 2) + event_bytes(0, 3))
    assert await client.call("EXISTS", f"seq:unreadable:{{u:{user}}}") == 1


async def test_lost_ring_is_counted_and_restarts_with_the_pushed_event(client: RedisClient, new_user: NewUser):
    user = new_user()
    store = SequenceStore(client, SequencesConfig())
    await store.push([consumed_event(user, 0, 1)])
    await client.call("DEL", f"seq:{{u:{user}}}")
    event = consumed_event(user, 0, 2)
    await store.push([event])
    assert (event.ring, event.is_new, store.rings_lost) == (event_bytes(0, 2), True, 1)


async def test_count_wraps_without_moving_events(client: RedisClient, new_user: NewUser):
    user = new_user()
    cap = 7
    stored = b"".join(event_bytes(0, offset) for offset in range(3, 10))
    ring = Ring(cap, count=MAX_COUNT - 3, source=source(0), last_offset=9, events=stored)
    await client.call("SET", f"seq:{{u:{user}}}", ring.value())
    store = SequenceStore(client, SequencesConfig(max_events=cap))
    await store.push([consumed_event(user, 0, offset) for offset in range(10, 15)])
    expected = b"".join(event_bytes(0, offset) for offset in range(8, 15))
    value = await read_value(client, user)
    assert value
    assert Ring.from_value(value, cap).events == expected
    assert Ring.from_value(value, cap).count < MAX_COUNT
    event = consumed_event(user, 0, 15)
    await store.push([event])
    assert event.ring == expected[24:] + event_bytes(0, 15)


async def test_cache_stays_within_its_bound_and_forgets_partitions(client: RedisClient, new_user: NewUser):
    store = SequenceStore(client, SequencesConfig(cache_mib=1))
    users = [new_user() for _ in range(3000)]
    await store.push([consumed_event(user, number % 2, 1) for number, user in enumerate(users)])
    cache = store._cache
    assert 1500 < len(cache) < 3000
    assert cache.bytes <= 1 << 20
    store.forget(PARTITIONS[0])
    store.forget(PARTITIONS[1])
    assert (len(cache), cache.bytes) == (0, 0)


class LosesReplies:
    """A client whose next pushes are carried out, but their replies never arrive."""

    def __init__(self, client: RedisClient, lost: int) -> None:
        self._client = client
        self.keys = client.keys
        self.lost = lost

    async def pipeline(self, commands: list) -> list:
        replies = await self._client.pipeline(commands)
        if commands and commands[0][0] == "FCALL" and self.lost:
            self.lost -= 1
            raise StoreUnavailable("the reply is lost")
        return replies


async def push_until_answered(store: SequenceStore, events: list[ConsumedEvent]) -> None:
    while True:
        try:
            return await store.push(events)
        except StoreUnavailable:
            continue


@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize("cached", ["nothing", "the user", "another user", "the user, then forgotten"])
async def test_events_whose_push_was_not_answered_are_new_and_redelivered_ones_are_not(
    client: RedisClient, new_user: NewUser, lost: int, cached: str
) -> None:
    user, other = new_user(), new_user()
    await SequenceStore(client, SequencesConfig()).push([consumed_event(user, 0, offset) for offset in range(3)])
    store = SequenceStore(LosesReplies(client, 0), SequencesConfig())  # pyright: ignore[reportArgumentType]: a client's part
    if cached != "nothing":
        await store.push([consumed_event(other if cached == "another user" else user, 0, 3)])
    if cached == "the user, then forgotten":
        store.forget(PARTITIONS[0])
    store._client.lost = lost  # pyright: ignore[reportAttributeAccessIssue]: as above
    first = 1 if cached == "nothing" else 4  # 1 and 2: read again after a start
    events = [consumed_event(user, 0, offset) for offset in range(first, 9)]
    events += [consumed_event(new, 0, 9) for new in (new_user(), new_user())]
    await push_until_answered(store, events)
    assert [event.is_new for event in events] == [event.record_offset.offset > 2 for event in events]
    newest = SequenceStore(client, SequencesConfig())
    after = consumed_event(user, 0, 20)
    await newest.push([after])
    assert after.ring.startswith(events[7 if first == 1 else 4].ring), "and each is in the ring once"
    assert events[0].ring.endswith(event_bytes(0, 8)) or not lost
