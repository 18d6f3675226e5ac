"""Rings restored in a real Valkey: whole ones stay, stale ones are completed, those with gaps are rewritten."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.records import EVENT_BYTES, Event
from worker.clock import WallClock
from worker.config import Config, SequencesConfig
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.operations.ring_restorer import RingRestorer
from worker.redis.client import RedisClient
from worker.redis.rings.ring import Ring
from worker.redis.rings.sequences import SequenceStore

_user_numbers = count()
Place = tuple[int, int]  # partition, offset


@pytest.fixture
def new_user() -> Callable[[], str]:
    return lambda: f"restored{next(_user_numbers)}"


def event_bytes(place: Place) -> bytes:
    return blake2b(repr(place).encode(), digest_size=EVENT_BYTES).digest()


def consumed(user: str, places: list[Place], topic: str = "events") -> list[ConsumedEvent]:
    event = Event(user, "i", "view", 1)
    offsets = [RecordOffset(Partition(topic, partition), 0, offset) for partition, offset in places]
    return [
        ConsumedEvent(event, event_bytes((each.partition.partition, each.offset)), each, 1_000_000, 0, 0.0)
        for each in offsets
    ]


@dataclass
class Stream:
    """What became of one user's events: `arrivals` in the order in which the workers pushed them.

    Of partition p the topic holds offsets from `begins[p]`, and after a rebuild's first pass from `later_begins[p]`;
    the group has committed `committed[p]`. After `lost_after` arrivals Redis was set back to its state after `kept`
    arrivals.
    """

    arrivals: list[Place]
    begins: tuple[int, int]
    committed: tuple[int, int]
    kept: int
    lost_after: int
    cap: int = 512
    later_begins: tuple[int, int] = (0, 0)

    @property
    def read(self) -> list[Place]:
        """What a rebuild reads in its first pass, partition after partition."""
        return sorted((p, o) for p, o in self.arrivals if self.begins[p] <= o)

    @property
    def read_later(self) -> list[Place]:
        """What a rebuild reads in its second pass."""
        return [(p, o) for p, o in self.read if self.later_begins[p] <= o]

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost, and it can be seen.

        A full ring may have dropped an event of one partition before it received one of the other that the topic no
        longer has, which looks as if the first had been lost.
        """
        one_partition = len({p for p, _ in self.arrivals}) == 1
        return self.kept == self.lost_after and (one_partition or len(self.arrivals) <= self.cap)

    @property
    def read_again(self) -> list[Place]:
        """What the workers read after the rebuild."""
        return [(p, o) for p, o in self.arrivals if o >= max(self.committed[p], self.later_begins[p])]

    @property
    def pushed(self) -> list[Place]:
        """What has been in Redis before the rebuild and was not lost; of a full ring only the newest."""
        return self.arrivals[: self.kept] + self.arrivals[self.lost_after :]


async def ring_of(client: RedisClient, user: str, cap: int) -> list[bytes]:
    ring = Ring.from_value(await client.call("GET", client.keys.ring(user)) or b"", cap)
    return [ring.events[at : at + EVENT_BYTES] for at in range(0, len(ring.events), EVENT_BYTES)]


async def push(client: RedisClient, stream: Stream, user: str, places: list[Place]) -> None:
    """Push as a worker does that has nothing cached."""
    store = SequenceStore(client, SequencesConfig(max_events=stream.cap))
    for place in places:
        await store.push(consumed(user, [place]))


async def consume(client: RedisClient, stream: Stream, user: str) -> None:
    """Bring Redis into the state that the stream describes."""
    key = client.keys.ring(user)
    await push(client, stream, user, stream.arrivals[: stream.kept])
    snapshot = await client.call("GET", key)
    await push(client, stream, user, stream.arrivals[stream.kept : stream.lost_after])
    await client.call(*(("SET", key, snapshot) if snapshot else ("DEL", key)))
    await push(client, stream, user, stream.arrivals[stream.lost_after :])


def restorer(client: RedisClient, stream: Stream) -> RingRestorer:
    config = Config(sequences=SequencesConfig(max_events=stream.cap))
    committed = {Partition("events", p): offset for p, offset in enumerate(stream.committed)}
    return RingRestorer(config, client, WallClock(), committed, None)


def in_polls(places: list[Place], polls: int) -> list[list[Place]]:
    ends = [len(places) * poll // polls for poll in range(polls + 1)]
    return [places[start:end] for start, end in pairwise(ends)]


async def restore(client: RedisClient, stream: Stream, user: str, polls: int = 2) -> int:
    """Restore as `Rebuild` does, and return the number of rings that were rewritten."""
    rings = restorer(client, stream)
    for chunk in in_polls(stream.read, polls):
        await rings.restore(consumed(user, chunk))
    passes = rings.passes()
    for users in passes:
        before = await client.call("GET", client.keys.ring(user))
        await rings.start_pass(users)
        for chunk in in_polls(stream.read_later, polls):
            await rings.collect(consumed(user, chunk))
        assert await client.call("GET", client.keys.ring(user)) == before
        await rings.finish_pass()
    return len(passes)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    partitions = draw(st.lists(st.integers(0, 1), min_size=1, max_size=24))
    offsets = [0, 0]
    arrivals = []
    for partition in partitions:
        arrivals.append((partition, offsets[partition]))
        offsets[partition] += 1
    committed = [draw(st.integers(max(0, end - 3), end)) for end in offsets]
    begins = [draw(st.integers(0, end)) for end in committed]
    lost_after = draw(st.integers(0, len(arrivals)))
    kept = draw(st.integers(0, lost_after))
    cap = draw(st.sampled_from([4, 7, 64]))
    later_begins = [draw(st.integers(begin, end)) for begin, end in zip(begins, offsets, strict=True)]
    return Stream(
        arrivals,
        (begins[0], begins[1]),
        (committed[0], committed[1]),
        kept,
        lost_after,
        cap,
        (later_begins[0], later_begins[1]),
    )


ONE_PARTITION = [(0, offset) for offset in range(10)]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(stream=streams(), polls=st.integers(1, 3))
@example(stream=Stream(ONE_PARTITION, (4, 0), (10, 0), kept=10, lost_after=10, cap=64), polls=1)
@example(stream=Stream(ONE_PARTITION, (4, 0), (10, 0), kept=0, lost_after=7, cap=64), polls=1)
@example(stream=Stream(ONE_PARTITION, (4, 0), (10, 0), kept=5, lost_after=7, cap=64), polls=1)
@example(stream=Stream(ONE_PARTITION, (0, 0), (10, 0), kept=5, lost_after=7, cap=7), polls=1)
@example(stream=Stream(ONE_PARTITION, (0, 0), (10, 0), 5, 7, cap=64, later_begins=(6, 0)), polls=1)
@example(stream=Stream(ONE_PARTITION, (0, 0), (8, 0), 5, 7, cap=64, later_begins=(10, 0)), polls=1)
async def test_restored_ring_has_every_event_that_it_or_the_topic_had_once_and_a_whole_ring_is_kept(
    client: RedisClient, new_user: Callable[[], str], stream: Stream, polls: int
):
    user = new_user()
    await consume(client, stream, user)
    before = await ring_of(client, user, stream.cap)
    rewritten = await restore(client, stream, user, polls)
    if stream.is_whole:
        assert rewritten == 0
        assert await ring_of(client, user, stream.cap) == before
    await push(client, stream, user, stream.read_again)
    ring = await ring_of(client, user, stream.cap)
    assert len(set(ring)) == len(ring)
    left = {event_bytes(place) for place in stream.pushed + stream.read_later + stream.read_again}
    seen = left | {event_bytes(place) for place in stream.read}
    assert set(ring) <= seen
    if len(seen) <= stream.cap:
        assert left <= set(ring)
    elif len(left) >= stream.cap:
        assert len(ring) == stream.cap


async def test_rings_with_gaps_are_rewritten_in_as_many_passes_as_their_memory_takes(
    client: RedisClient, new_user: Callable[[], str]
):
    stream = Stream(ONE_PARTITION, (0, 0), (10, 0), kept=5, lost_after=7)
    users = [new_user() for _ in range(5)]
    for user in users:
        await consume(client, stream, user)
    rings = restorer(client, stream)
    events = [event for user in users for event in consumed(user, stream.read)]
    await rings.restore(events)
    passes = rings.passes(limit_bytes=4000)
    assert passes == [users[:2], users[2:4], users[4:]]
    for part in passes:
        await rings.start_pass(part)
        await rings.collect(events)
        assert await rings.finish_pass() == 2 * len(part)
    for user in users:
        assert await ring_of(client, user, stream.cap) == [event_bytes(place) for place in ONE_PARTITION]
