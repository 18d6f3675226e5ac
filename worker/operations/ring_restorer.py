"""Write the events of a topic into rings, of which some are lost, some are stale, some have gaps and most are whole.

Every event of the topic is given twice. In the first pass lost rings are filled and stale ones completed by ordinary
pushes, and every other ring is compared with the events that it should have. Between the passes, rings with gaps are
cut where the topic's events begin; the second pass pushes the topic's events to these rings alone.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from pipeline.records import DAY_S
from worker.config import Config
from worker.errors import StoreError
from worker.interfaces import Clock, ConsumedEvent, Partition
from worker.operations.group_fence import GroupFence
from worker.redis.client import Command, RedisClient
from worker.redis.rings.ring import Ring, source_id
from worker.redis.rings.ring_check import RingCheck
from worker.redis.rings.sequences import SequenceStore
from worker.stream.health import HealthState
from worker.stream.retry import Retry

CHUNK_EVENTS = 1000  # read, compared and pushed at a time: 12 MiB of full rings


class RingRestorer:
    """Retries its reads and writes until they succeed or fail permanently."""

    def __init__(
        self,
        config: Config,
        client: RedisClient,
        clock: Clock,
        committed: Mapping[Partition, int],
        fence: GroupFence | None,
    ) -> None:
        """committed: of every partition, the offset from which the workers read: later events are only compared."""
        self._config = config.sequences
        self._client = client
        self._fence = fence
        self._committed = {self._source(partition): offset for partition, offset in committed.items()}
        self._store = SequenceStore(client, config.sequences)
        self._retry = Retry(config.redis.retry_backoff_s, HealthState(clock))
        self._checks: dict[str, RingCheck | None] = {}  # None: the ring had none of the events
        self._rings: dict[str, Ring] = {}  # of one chunk

    @property
    def user_count(self) -> int:
        return len(self._checks)

    async def restore(self, events: Sequence[ConsumedEvent]) -> int:
        """Push the events that their rings do not claim to have, and compare the others. Return the number appended."""
        count = 0
        for start in range(0, len(events), CHUNK_EVENTS):
            chunk = events[start : start + CHUNK_EVENTS]
            await self._retry(self._read_rings, self._users_to_check(chunk))
            unclaimed = [event for event in chunk if not self._is_claimed(event)]
            count += await self._push([event for event in unclaimed if self._is_committed(event)])
        return count

    async def cut_rings_with_gaps(self) -> int:
        """Cut these rings where the topic's events begin. Return their number."""
        users = [user_id for user_id, check in self._checks.items() if check is not None and check.must_rewrite]
        for start in range(0, len(users), CHUNK_EVENTS):
            chunk = users[start : start + CHUNK_EVENTS]
            await self._retry(self._read_rings, chunk)
            await self._retry(self._write, [self._cut(user_id) for user_id in chunk])
        self._store = SequenceStore(self._client, self._config)  # what the old one has cached was cut
        self._checks = {user_id: self._checks[user_id] for user_id in users}
        return len(users)

    async def rewrite(self, events: Sequence[ConsumedEvent]) -> int:
        """Push the events of users whose ring was cut. Return the number appended."""
        count = 0
        for start in range(0, len(events), CHUNK_EVENTS):
            chunk = events[start : start + CHUNK_EVENTS]
            chunk = [event for event in chunk if event.event.user_id in self._checks]
            count += await self._push([event for event in chunk if self._is_committed(event)])
        return count

    def _users_to_check(self, events: Sequence[ConsumedEvent]) -> list[str]:
        """Return the users whose ring is not known yet, or claims to have events of the topic."""
        users = dict.fromkeys(event.event.user_id for event in events)
        return [user for user in users if user not in self._checks or self._checks[user] is not None]

    def _is_committed(self, consumed: ConsumedEvent) -> bool:
        return consumed.record_offset.offset < self._committed[self._source(consumed.record_offset.partition)]

    def _is_claimed(self, consumed: ConsumedEvent) -> bool:
        """Compare the event with its ring if the ring should have it."""
        user_id = consumed.event.user_id
        partition, _, offset = consumed.record_offset
        if user_id not in self._checks:
            self._checks[user_id] = RingCheck.start(
                self._rings[user_id], self._committed.keys(), self._config.max_events
            )
        check = self._checks[user_id]
        source = self._source(partition)
        if check is None or not check.claims_event(source, offset):
            return False
        check.compare(self._rings[user_id], source, consumed.packed)
        return True

    async def _read_rings(self, users: Sequence[str]) -> None:
        values = await self._client.pipeline([("GET", self._client.keys.ring(user_id)) for user_id in users])
        self._rings = {user: self._parsed(user, value or b"") for user, value in zip(users, values, strict=True)}

    def _parsed(self, user_id: str, value: bytes) -> Ring:
        try:
            return Ring.from_value(value, self._config.max_events)
        except ValueError as error:
            raise StoreError(f"{self._client.keys.ring(user_id)} in Redis: {error}") from error

    def _cut(self, user_id: str) -> Command:
        check = self._checks[user_id]
        assert check is not None
        ring = check.without_topic(self._rings[user_id], self._committed.keys())
        if not ring.count:
            return "DEL", self._client.keys.ring(user_id)
        return "SET", self._client.keys.ring(user_id), ring.value(), "EX", int(self._config.ttl_days * DAY_S)

    async def _push(self, events: list[ConsumedEvent]) -> int:
        if events:
            await self._retry(self._push_once, events)
        return sum(event.is_new for event in events)

    async def _push_once(self, events: Sequence[ConsumedEvent]) -> None:
        async with self._writing():
            await self._store.push(events)

    async def _write(self, commands: Sequence[Command]) -> None:
        async with self._writing():
            await self._client.pipeline(commands)

    def _writing(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._fence is None else self._fence.writing()

    def _source(self, partition: Partition) -> bytes:
        return source_id(self._config.topic_generation, partition)
