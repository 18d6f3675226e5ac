"""The users' rings: kept in Redis, cached here while their partition is owned. Implements interfaces.Store.

A batch is one pipeline, a command a user. Each command names the version (header) of the ring that this process knows;
only when Redis holds another one does the reply carry the ring. Either way the events are then appended here exactly
as the function did there, so every consumed gets the ring as it was at its own turn.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pipeline.records import DAY_S
from worker import logging, metrics
from worker.config import SequencesConfig as Config
from worker.errors import StoreError, TopicRecreated
from worker.interfaces import ConsumedEvent, Partition
from worker.redis.client import Command, RedisClient, ring_key
from worker.redis.ring import Ring
from worker.redis.ring_cache import RingCache

log = logging.get("sequences")
WARN_EVERY_S = 60.0
ANY_VERSION = b"?"  # no ring has this version: the reply carries the ring


@dataclass(slots=True)
class UserPush:
    """Arrivals of one user from one partition, in order: one command."""

    user_id: str
    partition: Partition
    events: list[ConsumedEvent]
    cached: Ring | None  # the cached ring, if there is one
    is_first_of_user: bool  # of this user in the batch: only then is the known version still that of Redis


class SequenceStore:
    """Pushes are carried out one batch after the other. `rebuild`: a user's old ring is dropped at their first push."""

    def __init__(
        self,
        client: RedisClient,
        config: Config,
        monotonic: Callable[[], float] = time.monotonic,
        rebuild: bool = False,
    ) -> None:
        self.rings_lost = 0
        self._client, self._config, self._monotonic = client, config, monotonic
        self._cache = RingCache(config.cache_mib << 20)
        self._sources: dict[Partition, bytes] = {}
        self._push_lock = asyncio.Lock()  # two pushes of one user at once would append in either order
        self._rebuilt: set[str] | None = set() if rebuild else None
        self._warned_s = float("-inf")
        self._max_events, self._ttl_s = str(config.max_events).encode(), str(int(config.ttl_days * DAY_S)).encode()

    async def push(self, events: Sequence[ConsumedEvent]) -> None:
        """Append the events and set `ring` and `is_new` of every consumed: see Store.push.

        When it raises StoreUnavailable, some events may be in Redis: pushing the same again skips them.
        """
        async with self._push_lock:
            groups, lost = self._grouped(events), self.rings_lost
            replies = await self._client.pipeline([self._command(group) for group in groups])
            moved = [self._apply(group, reply) for group, reply in zip(groups, replies, strict=True)]
        self._warn(self.rings_lost - lost)
        for group, stored in zip(groups, moved, strict=True):
            if stored is not None:
                raise self._recreated(group, stored)

    def forget(self, partition: Partition) -> None:
        """The partition is no longer owned: others will write these rings."""
        self._cache.forget(partition)

    def source(self, partition: Partition) -> bytes:
        """The 8 bytes that name a partition of this epoch in rings."""
        source = self._sources.get(partition)
        if source is None:
            source = self._sources[partition] = source_id(self._config.topic_generation, partition)
        return source

    def _grouped(self, arrivals: Sequence[ConsumedEvent]) -> list[UserPush]:
        newest: dict[str, UserPush] = {}
        groups: list[UserPush] = []
        for consumed in arrivals:
            user_id, partition = consumed.event.user_id, consumed.record_offset.partition
            group = newest.get(user_id)
            if group is None or group.partition != partition:
                group = newest[user_id] = UserPush(user_id, partition, [], self._cache.get(user_id), group is None)
                groups.append(group)
            group.events.append(consumed)
        return groups

    def _command(self, group: UserPush) -> Command:
        arrivals, user_id = group.events, group.user_id
        if len(arrivals) == 1:
            entries = arrivals[0].record_offset.offset.to_bytes(8, "little") + arrivals[0].packed
        else:
            entries = b"".join([each.record_offset.offset.to_bytes(8, "little") + each.packed for each in arrivals])
        known = ANY_VERSION if not group.is_first_of_user else group.cached.header() if group.cached else b""
        source, end_offset = self.source(group.partition), arrivals[-1].end_offset
        push = (
            "FCALL",
            "millrace_push",
            1,
            ring_key(user_id),
            self._max_events,
            self._ttl_s,
            known,
            source,
            end_offset,
            entries,
        )
        return push if self._rebuilt is None or user_id in self._rebuilt else (*push, "fresh")

    def _apply(self, group: UserPush, reply: Any) -> int | None:
        """Do here what the function did there. The stored last offset when it found the topic re-created."""
        if isinstance(reply, list):
            return reply[1]
        ring = self._ring_before(group, reply)
        source, cap, fresh = self.source(group.partition), self._config.max_events, 0
        for consumed in group.events:
            consumed.is_new = ring.push(source, consumed.record_offset.offset, consumed.packed, cap)
            consumed.ring = ring.events
            fresh += consumed.is_new
        assert reply == fresh or isinstance(reply, bytes), f"{group.user_id}: Redis appended {reply}, we {fresh}"
        self._cache.put(group.user_id, ring, group.partition)
        if self._rebuilt is not None:
            self._rebuilt.add(group.user_id)
        return None

    def _ring_before(self, group: UserPush, reply: int | bytes) -> Ring:
        """The ring as it was in Redis before this push."""
        if isinstance(reply, int):
            return group.cached or Ring(self._config.max_events)
        if not reply and group.is_first_of_user and group.cached is not None and self._rebuilt is None:
            self.rings_lost += 1
            metrics.LOST_RINGS.inc()
        try:
            return Ring.from_value(reply, self._config.max_events)
        except ValueError as error:
            raise StoreError(f"{ring_key(group.user_id)} in Redis: {error}") from error

    def _warn(self, lost: int) -> None:
        """At most one a minute, however many rings are gone."""
        if lost and self._monotonic() - self._warned_s >= WARN_EVERY_S:
            self._warned_s = self._monotonic()
            log.warning("Redis lost rings; `millrace rebuild` restores them from the topic", rings_lost=self.rings_lost)

    def _recreated(self, group: UserPush, stored: int) -> TopicRecreated:
        topic, partition = group.partition
        return TopicRecreated(
            f"{ring_key(group.user_id)} in Redis has read {topic}-{partition} up to offset {stored}, but the partition "
            f"ends at {group.events[-1].end_offset}: the topic was re-created; change "
            "sequences.topic_generation"
        )


def source_id(epoch: str, partition: Partition) -> bytes:
    return blake2b(f"{epoch}\0{partition.topic}\0{partition.partition}".encode(), digest_size=8).digest()
