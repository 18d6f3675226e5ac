"""The users' rings: stored in Redis, cached here while their partition is owned.

A batch is one pipeline, with one command per user and partition. Each command names the version (header) of the ring
that is cached here; only when Redis holds another version does the reply carry the ring. Either way the events are then
appended here exactly as the function did there, so every event gets the ring as it was right after its own append.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.records import DAY_S
from worker import logging, metrics
from worker.config import SequencesConfig
from worker.errors import StoreError, StoreUnavailable, TopicRecreated
from worker.interfaces import ConsumedEvent, Partition
from worker.redis.client import Command, RedisClient
from worker.redis.functions import PUSH
from worker.redis.ownership import Claim, Claims
from worker.redis.rings.ring import HEADER, Ring, source_id
from worker.redis.rings.ring_cache import RingCache
from worker.redis.rings.unreadable import set_unreadable_aside

log = logging.get("sequences")
WARNING_INTERVAL_S = 60.0
ANY_VERSION = b"?"  # no ring has this version: the reply carries the ring


@dataclass(slots=True)
class UserPush:
    """One command: events of one user from one partition, in order."""

    user_id: str
    partition: Partition
    source: bytes
    events: list[ConsumedEvent]
    cached: Ring | None
    is_first_of_user: bool  # in the batch: only then is the cached version the one that the command will find
    is_first_attempt: bool
    stored_offset: int | None = None  # its source's last offset in Redis, where that is not in the partition

    def expected_version(self) -> bytes:
        """Return the header that Redis is expected to hold, empty for no ring."""
        if not self.is_first_of_user:
            return ANY_VERSION
        return self.cached.header() if self.cached else b""


class SequenceStore:
    """Implements Store. Runs one push at a time."""

    def __init__(
        self,
        client: RedisClient,
        config: SequencesConfig,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.claims = Claims(client)
        self.ask_end: Callable[[Partition], Awaitable[int]] | None = None  # where a partition ends now
        self.rings_lost = 0
        self._client = client
        self._config = config
        self._monotonic = monotonic
        self._cache = RingCache(config.cache_mib << 20)
        self._push_lock = asyncio.Lock()  # concurrent pushes of one user would append in either order
        self._settled: set[bytes] = set()  # sources past the records that an earlier owner may have pushed
        self._warned_s = float("-inf")
        self._max_events = str(config.max_events).encode()
        self._ttl_s = str(int(config.ttl_days * DAY_S)).encode()

    async def push(self, events: Sequence[ConsumedEvent]) -> None:
        """Append the events and set `ring` and `is_new` of each: see Store.push.

        When it raises StoreUnavailable, some events may be in Redis: pushing the same again skips them. A key that
        holds no ring is renamed first, so that the next attempt finds none.
        """
        try:
            if overtaken := await self._push(events):
                await self._check_ends(overtaken)
                if overtaken := await self._push([event for push in overtaken for event in push.events]):
                    raise self._recreated_error(overtaken[0])
        except StoreError as error:
            if error.retriable or isinstance(error, TopicRecreated):
                raise
            if not (keys := await set_unreadable_aside(self._client, [each.event.user_id for each in events])):
                raise
            raise StoreUnavailable(f"{', '.join(keys[:3])} in Redis held no ring and was renamed") from error

    async def _push(self, events: Sequence[ConsumedEvent]) -> list[UserPush]:
        """Return the pushes that changed nothing, because their source's last offset is not in their partition."""
        async with self._push_lock:
            lost_before = self.rings_lost
            pushes = self._group(events)
            await self._note_offsets([push for push in pushes if push.is_first_attempt])
            replies = await self.claims.pipeline([self._command(push) for push in pushes])
            # All of them before any event is touched: a value that is no ring fails the whole attempt.
            rings = [self._ring_before(push, reply) for push, reply in zip(pushes, replies, strict=True)]
            for push, reply, ring in zip(pushes, replies, rings, strict=True):
                self._apply(push, reply, ring)
        self._warn(self.rings_lost - lost_before)
        return [push for push in pushes if push.stored_offset is not None]

    async def _check_ends(self, overtaken: Sequence[UserPush]) -> None:
        """Tell a topic that was created again from one that another worker has read further.

        A worker that stood still for longer than its session may push before it learns that its partitions are
        another's: then the offset in Redis lies within the partition as it is now. Raises TopicRecreated.
        """
        partitions = {push.partition for push in overtaken}
        ends = {partition: await self.ask_end(partition) for partition in partitions} if self.ask_end else {}
        for push in overtaken:
            end = ends.get(push.partition, push.events[-1].end_offset)
            if push.stored_offset is None or push.stored_offset >= end:
                raise self._recreated_error(push)
            for event in push.events:
                event.end_offset = end
                event.ring_offset = None
        for partition in partitions:
            self.forget(partition)
        log.warning("another worker has read further: this one stood still", partitions=sorted(map(str, partitions)))

    async def claim_topic(self, topic: str, topic_id: str) -> None:
        """Note that the rings' offsets are of the topic with this id. Raises TopicRecreated if they are another's."""
        key = self._client.keys.topic(self._config.topic_generation, topic)

        def refusal(owner: str) -> TopicRecreated:
            return TopicRecreated(
                f"topic {topic} has id {topic_id}, but the rings in Redis have offsets of id {owner} ({key}): "
                f"the topic was deleted and created again; set sequences.topic_generation, now "
                f"{self._config.topic_generation!r}, to a value that was never used; the rings keep their events"
            )

        await self.claims.add(Claim(key, topic_id, refusal))

    def forget(self, partition: Partition) -> None:
        """Drop the cached rings of a partition that is no longer owned: other processes will write them."""
        self._cache.forget(partition)
        self._settled.discard(source_id(self._config.topic_generation, partition))

    def _group(self, events: Sequence[ConsumedEvent]) -> list[UserPush]:
        latest: dict[str, UserPush] = {}
        pushes: list[UserPush] = []
        for event in events:
            user_id = event.event.user_id
            partition = event.record_offset.partition
            push = latest.get(user_id)
            if push is None or push.partition != partition:
                source = source_id(self._config.topic_generation, partition)
                cached = self._cache.get(user_id)
                push = UserPush(user_id, partition, source, [], cached, push is None, event.ring_offset is None)
                latest[user_id] = push
                pushes.append(push)
            push.events.append(event)
        return pushes

    async def _note_offsets(self, pushes: Sequence[UserPush]) -> None:
        """Set the events' `ring_offset`: when the reply is lost, nothing else tells which of them were new.

        A ring that is not cached is looked at only while its partition has yielded nothing new.
        """
        unread = [push for push in pushes if push.cached is None and push.source not in self._settled]
        users = list({push.user_id for push in unread})
        replies = await self._client.pipeline(
            [("GETRANGE", self._client.keys.ring(user), 0, HEADER.size - 1) for user in users]
        )
        headers = dict(zip(users, replies, strict=True))
        for push in pushes:
            ring = push.cached or self._parsed(push.user_id, headers.get(push.user_id, b""), is_header=True)
            for event in push.events:
                event.ring_offset = ring.get_last_offset(push.source)

    def _command(self, push: UserPush) -> Command:
        """Return the FCALL of one push; sequences.lua describes its arguments."""
        return (
            "FCALL",
            PUSH.function,
            1,
            self._client.keys.ring(push.user_id),
            self._max_events,
            self._ttl_s,
            push.expected_version(),
            push.source,
            push.events[-1].end_offset,
            b"".join([event.record_offset.offset.to_bytes(8, "little") + event.packed for event in push.events]),
        )

    def _apply(self, push: UserPush, reply: Any, ring: Ring) -> None:
        """Append as the function did, or keep the stored offset for which it did not."""
        if isinstance(reply, list):
            push.stored_offset = reply[1]
            return
        appended = 0
        for event in push.events:
            offset = event.record_offset.offset
            is_appended = ring.push(push.source, offset, event.packed, self._config.max_events)
            was_appended = not push.is_first_attempt and event.ring_offset is not None and offset > event.ring_offset
            event.is_new = is_appended or was_appended
            event.ring = ring.events
            event.ring_offset = None
            appended += is_appended
        assert reply == appended or isinstance(reply, bytes), f"{push.user_id}: Redis {reply}, here {appended} appended"
        self._cache.put(push.user_id, ring, push.partition)
        if push.events[-1].is_new:
            self._settled.add(push.source)

    def _ring_before(self, push: UserPush, reply: Any) -> Ring:
        """Return the ring as it was in Redis before this push."""
        if not isinstance(reply, bytes):
            return push.cached or Ring(self._config.max_events)
        if not reply and push.is_first_of_user and push.cached is not None:
            self.rings_lost += 1
            metrics.LOST_RINGS.inc()
        return self._parsed(push.user_id, reply)

    def _parsed(self, user_id: str, value: bytes, is_header: bool = False) -> Ring:
        try:
            if is_header and value:
                return Ring.from_header(value)
            return Ring.from_value(value, self._config.max_events)
        except ValueError as error:
            raise StoreError(f"{self._client.keys.ring(user_id)} in Redis: {error}") from error

    def _warn(self, lost: int) -> None:
        """Log lost rings, at most once per WARNING_INTERVAL_S."""
        if lost and self._monotonic() - self._warned_s >= WARNING_INTERVAL_S:
            self._warned_s = self._monotonic()
            log.warning("Redis lost rings; `millrace rebuild` restores them from the topic", rings_lost=self.rings_lost)

    def _recreated_error(self, push: UserPush) -> TopicRecreated:
        topic, partition = push.partition
        return TopicRecreated(
            f"{self._client.keys.ring(push.user_id)} in Redis has read {topic}-{partition} up to offset "
            f"{push.stored_offset}, but the partition ends at {push.events[-1].end_offset}: the topic was re-created; "
            "change sequences.topic_generation"
        )
