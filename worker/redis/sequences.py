"""The users' rings: kept in Redis, cached here while their partition is owned. Implements interfaces.Store.

A batch is one pipeline, a command a user. Each command names the version (header) of the ring that this process knows;
only when Redis holds another one does the reply carry the ring. Either way the events are then appended here exactly
as the function did there, so every arrival gets the ring as it was at its own turn.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from worker import logging, metrics
from worker.config import Sequences as Config
from worker.errors import StoreError, TopicRecreated
from worker.interfaces import Arrival, Partition
from worker.redis.client import Command, RedisClient, ring_key
from worker.redis.ring import Ring
from worker.redis.ring_cache import RingCache

log = logging.get("sequences")
DAY_S = 86_400
WARN_EVERY_S = 60.0
ANY = b"?"  # no ring has this version: the reply carries the ring


@dataclass(slots=True)
class Group:
    """Arrivals of one user from one partition, in order: one command."""

    user_id: str
    partition: Partition
    arrivals: list[Arrival]
    known: Ring | None  # the cached ring, if there is one
    first: bool  # of this user in the batch: only then is the known version still that of Redis


class Sequences:
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
        self._turn = asyncio.Lock()  # two pushes of one user at once would append in either order
        self._rebuilt: set[str] | None = set() if rebuild else None
        self._warned_s = float("-inf")
        self._cap, self._ttl_s = str(config.cap_events).encode(), str(int(config.ttl_days * DAY_S)).encode()

    async def push(self, arrivals: Sequence[Arrival]) -> None:
        """Append the events and set `ring` and `fresh` of every arrival: see Store.push.

        When it raises StoreUnavailable, some events may be in Redis: pushing the same again skips them.
        """
        async with self._turn:
            groups, lost = self._grouped(arrivals), self.rings_lost
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
            source = self._sources[partition] = source_of(self._config.epoch, partition)
        return source

    def _grouped(self, arrivals: Sequence[Arrival]) -> list[Group]:
        newest: dict[str, Group] = {}
        groups: list[Group] = []
        for arrival in arrivals:
            user_id, partition = arrival.event.user_id, arrival.ticket.partition
            group = newest.get(user_id)
            if group is None or group.partition != partition:
                group = newest[user_id] = Group(user_id, partition, [], self._cache.get(user_id), group is None)
                groups.append(group)
            group.arrivals.append(arrival)
        return groups

    def _command(self, group: Group) -> Command:
        arrivals, user_id = group.arrivals, group.user_id
        if len(arrivals) == 1:
            entries = arrivals[0].ticket.offset.to_bytes(8, "little") + arrivals[0].packed
        else:
            entries = b"".join([each.ticket.offset.to_bytes(8, "little") + each.packed for each in arrivals])
        known = ANY if not group.first else group.known.header() if group.known else b""
        source, end_offset = self.source(group.partition), arrivals[-1].end_offset
        push = (
            "FCALL",
            "millrace_push",
            1,
            ring_key(user_id),
            self._cap,
            self._ttl_s,
            known,
            source,
            end_offset,
            entries,
        )
        return push if self._rebuilt is None or user_id in self._rebuilt else (*push, "fresh")

    def _apply(self, group: Group, reply: Any) -> int | None:
        """Do here what the function did there. The stored last offset when it found the topic re-created."""
        if isinstance(reply, list):
            return reply[1]
        ring = self._before(group, reply)
        source, cap, fresh = self.source(group.partition), self._config.cap_events, 0
        for arrival in group.arrivals:
            arrival.fresh = ring.push(source, arrival.ticket.offset, arrival.packed, cap)
            arrival.ring = ring.events
            fresh += arrival.fresh
        assert reply == fresh or isinstance(reply, bytes), f"{group.user_id}: Redis appended {reply}, we {fresh}"
        self._cache.put(group.user_id, ring, group.partition)
        if self._rebuilt is not None:
            self._rebuilt.add(group.user_id)
        return None

    def _before(self, group: Group, reply: int | bytes) -> Ring:
        """The ring as it was in Redis before this push."""
        if isinstance(reply, int):
            return group.known or Ring(self._config.cap_events)
        if not reply and group.first and group.known is not None and self._rebuilt is None:
            self.rings_lost += 1
            metrics.RINGS_LOST.inc()
        try:
            return Ring.from_value(reply, self._config.cap_events)
        except ValueError as error:
            raise StoreError(f"{ring_key(group.user_id)} in Redis: {error}") from error

    def _warn(self, lost: int) -> None:
        """At most one a minute, however many rings are gone."""
        if lost and self._monotonic() - self._warned_s >= WARN_EVERY_S:
            self._warned_s = self._monotonic()
            log.warning("Redis lost rings; `millrace rebuild` restores them from the topic", rings_lost=self.rings_lost)

    def _recreated(self, group: Group, stored: int) -> TopicRecreated:
        topic, partition = group.partition
        return TopicRecreated(
            f"{ring_key(group.user_id)} in Redis has read {topic}-{partition} up to offset {stored}, but the partition "
            f"ends at {group.arrivals[-1].end_offset}: the topic was re-created; set sequences.epoch to another value"
        )


def source_of(epoch: str, partition: Partition) -> bytes:
    return blake2b(f"{epoch}\0{partition.topic}\0{partition.partition}".encode(), digest_size=8).digest()
