"""Continuous batching: entries of distinct users, earliest deadline first, grouped by the length of their rings.

A user is in at most one unfinished batch. Events that come meanwhile wait in the user's next entry, where they
coalesce: one slate answers them all. A batch is closed the moment the pipeline asks for one, so the pipeline is never
idle while an entry waits, and batches grow by themselves under load.
"""

import asyncio
import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count

from pipeline.records import EVENT_BYTES
from worker.config import BatcherConfig
from worker.interfaces import Batch, Clock, ConsumedEvent, Entry, Partition

# Items. Larger slates are ranked apart, because a batch ranks as many items as its largest slate: `Pipeline.rank` takes
# 46 ms for 10 items, 79 ms for 64 and 558 ms for 512 (256 users, 20,000 items, width 64, one EPYC core).
LARGE_SLATE = 64
Lane = tuple[str, bool, int]  # (requested strategy or "", a large slate is requested, length bucket)
HeapEntry = tuple[int, int, Entry]  # (deadline_ms, order of admission, entry)


class Batcher:
    """Holds every admitted, unanswered triggering event. One task adds, one task takes."""

    def __init__(self, config: BatcherConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._buckets = sorted(config.length_buckets)
        self._users: dict[str, deque[Entry]] = {}  # by user, oldest first; the first may be in a batch
        self._lanes: dict[Lane, list[HeapEntry]] = {}
        self._order = count()
        self._ready = asyncio.Event()
        self._closed = False
        self.pending = 0  # events admitted and not yet finished
        self.ring_bytes = 0  # of their entries

    def add(self, events: Iterable[ConsumedEvent]) -> None:
        """Admit triggering events whose rings are set, those of one user in their order."""
        for event in events:
            self._add(event)
        self._wake()

    async def next(self) -> Batch | None:
        """Return the next batch as soon as any entry waits; None when closed and nothing waits."""
        await self._ready.wait()
        return self._take() if self._lanes else None

    def finish(self, batch: Batch) -> None:
        """Mark the batch as answered: its users' later entries may be batched now."""
        for entry in batch.entries:
            self.pending -= len(entry.events)
            self.ring_bytes -= len(entry.ring)
            queue = self._users[entry.user_id]
            queue.popleft()
            if queue:
                self._enqueue(queue[0])
            else:
                del self._users[entry.user_id]
        self._wake()

    def drop(self, partition: Partition) -> None:
        """Drop the entries of a partition that is no longer owned, except those in a batch: its next owner answers."""
        self._lanes.clear()
        for user_id, queue in list(self._users.items()):
            kept = deque(entry for entry in queue if entry.is_taken or entry.partition != partition)
            self.pending -= _count(queue) - _count(kept)
            self.ring_bytes -= _ring_bytes(queue) - _ring_bytes(kept)
            if kept:
                self._users[user_id] = kept
            else:
                del self._users[user_id]
            if kept and not kept[0].is_taken:
                self._enqueue(kept[0])
        self._wake()

    def close(self) -> None:
        """Accept no more events: `next` returns what is left, then None."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._lanes or (self._closed and not self._users):
            self._ready.set()
        else:
            self._ready.clear()

    def _add(self, event: ConsumedEvent) -> None:
        self.pending += 1
        self.ring_bytes += len(event.ring)
        queue = self._users.setdefault(event.event.user_id, deque())
        # The first entry may be in a batch already; then it takes no more events.
        if queue and self._config.coalesce and not queue[-1].is_taken and _same_slate(queue[-1].events[-1], event):
            self.ring_bytes -= len(queue[-1].ring)
            queue[-1].events[-1].ring = b""
            queue[-1].events.append(event)
            return
        queue.append(Entry(event.event.user_id, [event], self._deadline_ms(event), next(self._order)))
        if len(queue) == 1:
            self._enqueue(queue[0])

    def _deadline_ms(self, event: ConsumedEvent) -> int:
        """Return clamp(event ts, polled - slo/2, polled) + slo: a client's clock moves it by at most slo/2."""
        slo_ms = self._config.slo_ms
        polled_ms = event.polled_ms
        return min(max(event.event.ts_ms, polled_ms - slo_ms // 2), polled_ms) + slo_ms

    def _enqueue(self, entry: Entry) -> None:
        first = entry.events[0]
        lane = first.strategy or "", first.k is not None and first.k > LARGE_SLATE, self._bucket(entry)
        heapq.heappush(self._lanes.setdefault(lane, []), (entry.deadline_ms, entry.order, entry))

    def _bucket(self, entry: Entry) -> int:
        index = bisect_left(self._buckets, len(entry.ring) // EVENT_BYTES)
        return self._buckets[min(index, len(self._buckets) - 1)]

    def _take(self) -> Batch:
        """Return a batch: the earliest deadline sets its lane; entries of at most that length fill it up."""
        strategy, is_large, bucket = self._first_lane()
        batch = Batch([], bucket, strategy or None, opened_s=self._clock.monotonic())
        tokens = 0
        for entry in self._candidates(strategy, is_large, bucket):
            tokens += len(entry.ring) // EVENT_BYTES
            if batch.entries and tokens > self._config.max_tokens:
                self._enqueue(entry)
                break
            entry.is_taken = True
            batch.entries.append(entry)
            if len(batch.entries) == self._config.max_users:
                break
        self._wake()
        return batch

    def _first_lane(self) -> Lane:
        while True:
            lane = min(self._lanes, key=lambda lane: self._lanes[lane][0])
            if self._bucket(self._lanes[lane][0][2]) == lane[2]:
                return lane
            self._enqueue(self._pop(lane))  # it grew by coalescing

    def _candidates(self, strategy: str, is_large: bool, bucket: int) -> Iterator[Entry]:
        """Pop the entries of this strategy and slate size that fit the bucket, earliest deadline first."""
        while lanes := [lane for lane in self._lanes if lane[:2] == (strategy, is_large) and lane[2] <= bucket]:
            entry = self._pop(lanes[0] if len(lanes) == 1 else min(lanes, key=lambda lane: self._lanes[lane][0]))
            if self._bucket(entry) <= bucket:
                yield entry
            else:
                self._enqueue(entry)

    def _pop(self, lane: Lane) -> Entry:
        entry = heapq.heappop(self._lanes[lane])[2]
        if not self._lanes[lane]:
            del self._lanes[lane]
        return entry


def _count(entries: Iterable[Entry]) -> int:
    return sum(len(entry.events) for entry in entries)


def _ring_bytes(entries: Iterable[Entry]) -> int:
    return sum(len(entry.ring) for entry in entries)


def _same_slate(one: ConsumedEvent, other: ConsumedEvent) -> bool:
    """Whether one slate can answer both events: it names one partition and has one strategy and length."""
    return (
        one.record_offset[:2] == other.record_offset[:2]  # partition and assignment
        and one.strategy == other.strategy
        and one.k == other.k
    )
