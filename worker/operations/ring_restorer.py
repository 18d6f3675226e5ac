"""Write the events of a topic into rings, of which some are lost, some are stale, some have gaps and most are whole.

Every event of the topic is given once to `restore`: lost rings are filled and stale ones completed by ordinary pushes,
and every other ring is compared with the events that it should have. Rings with gaps are rewritten after further passes
over the topic, which `collect` their users' events. Redis keeps the old value of each until one SET replaces it, so a
pass that is interrupted, or from which retention deletes events, takes nothing away.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from pipeline.records import DAY_S, EVENT_BYTES
from worker.config import Config
from worker.errors import StoreError
from worker.interfaces import Clock, ConsumedEvent, Partition
from worker.operations.group_fence import GroupFence
from worker.redis.client import Command, RedisClient
from worker.redis.rings.ring import Ring, source_id
from worker.redis.rings.ring_check import RingCheck
from worker.redis.rings.ring_rewrite import RingRewrite, count_new_events
from worker.redis.rings.sequences import SequenceStore
from worker.stream.health import HealthState
from worker.stream.retry import Retry

CHUNK_EVENTS = 1000  # read, compared and pushed at a time: 12 MiB of full rings
# Of the rings that one pass collects. A million users with 50 events each take three passes.
PASS_BYTES = 1 << 30
# A RingRewrite with its check, its rings, the dictionary entry and the user id, without the events (tracemalloc: 951).
ENTRY_BYTES = 1200


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
        self._rewrites: dict[str, RingRewrite] = {}  # of one pass
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

    def passes(self, limit_bytes: int = PASS_BYTES) -> list[list[str]]:
        """Return the users whose rings have gaps: lists of which each is collected in one pass over the topic.

        limit_bytes: of the rings that one pass holds in memory
        """
        passes: list[list[str]] = []
        left_bytes = 0
        for user_id, count in self._counts_with_gaps():
            size = ENTRY_BYTES + min(count, self._config.max_events) * EVENT_BYTES
            if size > left_bytes:
                passes.append([])
                left_bytes = limit_bytes
            passes[-1].append(user_id)
            left_bytes -= size
        return passes

    async def start_pass(self, users: Sequence[str]) -> None:
        """Compare the rings of these users again, and collect the events of their new values."""
        self._rewrites = {}
        for start in range(0, len(users), CHUNK_EVENTS):
            await self._retry(self._read_rings, users[start : start + CHUNK_EVENTS])
            for user_id, ring in self._rings.items():
                self._rewrites[user_id] = RingRewrite.start(ring, self._committed.keys(), self._config.max_events)

    async def collect(self, events: Sequence[ConsumedEvent]) -> None:
        """Collect the events of the pass's users; give every event of the topic in every pass."""
        selected = [event for event in events if event.event.user_id in self._rewrites]
        for start in range(0, len(selected), CHUNK_EVENTS):
            chunk = selected[start : start + CHUNK_EVENTS]
            await self._retry(self._read_rings, list(dict.fromkeys(event.event.user_id for event in chunk)))
            for consumed in chunk:
                user_id = consumed.event.user_id
                partition, _, offset = consumed.record_offset
                is_committed = self._is_committed(consumed)
                self._rewrites[user_id].add(
                    self._rings[user_id], self._source(partition), offset, consumed.packed, is_committed
                )

    async def finish_pass(self) -> int:
        """Replace the rings of the pass's users, each in one step. Return the number of events that they lacked."""
        users = list(self._rewrites)
        restored = 0
        for start in range(0, len(users), CHUNK_EVENTS):
            chunk = users[start : start + CHUNK_EVENTS]
            await self._retry(self._read_rings, chunk)
            rings = {user_id: self._rewrites[user_id].compose(self._rings[user_id]) for user_id in chunk}
            await self._retry(self._write, [self._set(user_id, ring) for user_id, ring in rings.items() if ring.count])
            restored += sum(count_new_events(self._rings[user_id], ring) for user_id, ring in rings.items())
        self._rewrites = {}
        return restored

    def _counts_with_gaps(self) -> Iterator[tuple[str, int]]:
        """Yield each user whose ring has a gap, with an upper limit of the number of events in its new value."""
        for user_id, check in self._checks.items():
            if check is not None and check.must_rewrite:
                yield user_id, check.end - check.begin + check.topic_count

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
        if check is None:
            return False
        check.topic_count += 1
        if not check.claims_event(source, offset):
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

    def _set(self, user_id: str, ring: Ring) -> Command:
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
