"""Continuous batching: entries of distinct users, earliest deadline first, grouped by the length of their rings.

A user is in at most one unfinished batch. Events that arrive meanwhile wait in the user's next entry, and coalesce
there: one slate answers them all. A batch is closed the moment the pipeline asks for one, so it is never idle while an
entry waits, and batches grow by themselves under load.
"""

import asyncio
import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count

from pipeline.records import EVENT_BYTES
from worker.config import Batcher as BatcherConfig
from worker.interfaces import Arrival, Batch, Clock, Entry

Lane = tuple[str, int]  # (rung asked for or "", length bucket): what may share a batch
Waiting = tuple[int, int, Entry]  # (deadline_ms, order of arrival, entry): a heap's element


class Batcher:
    """Holds every admitted, unanswered triggering event. Single task adds, single task takes."""

    def __init__(self, config: BatcherConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._buckets = sorted(config.buckets)
        self._users: dict[str, deque[Entry]] = {}  # by user, oldest first; the first may be in a batch
        self._lanes: dict[Lane, list[Waiting]] = {}
        self._order = count()
        self._ready = asyncio.Event()
        self._closed = False
        self.pending = 0  # events admitted and not yet finished

    def add(self, arrivals: Iterable[Arrival]) -> None:
        """Admit triggering events whose rings are set; those of one user in their order."""
        for arrival in arrivals:
            self._add(arrival)
        self._wake()

    async def next(self) -> Batch | None:
        """The next batch as soon as any entry waits; None when closed and nothing waits any more."""
        await self._ready.wait()
        return self._take() if self._lanes else None

    def finish(self, batch: Batch) -> None:
        """The batch is answered: its users' later entries may be batched now."""
        for entry in batch.entries:
            self.pending -= len(entry.arrivals)
            queue = self._users[entry.user_id]
            queue.popleft()
            if queue:
                self._enqueue(queue[0])
            else:
                del self._users[entry.user_id]
        self._wake()

    def close(self) -> None:
        """No more adds: `next` goes on until everything is batched, then returns None."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._lanes or (self._closed and not self._users):
            self._ready.set()
        else:
            self._ready.clear()

    def _add(self, arrival: Arrival) -> None:
        self.pending += 1
        queue = self._users.setdefault(arrival.event.user_id, deque())
        # The first entry may be in a batch already, then it takes nothing more.
        if queue and self._config.coalesce and not queue[-1].taken and _alike(queue[-1].arrivals[-1], arrival):
            queue[-1].arrivals.append(arrival)
            return
        queue.append(Entry(arrival.event.user_id, [arrival], self._deadline_ms(arrival), next(self._order)))
        if len(queue) == 1:
            self._enqueue(queue[0])

    def _deadline_ms(self, arrival: Arrival) -> int:
        """clamp(event ts, polled - slo/2, polled) + slo: a client's clock can neither jump the queue nor starve."""
        slo_ms, polled_ms = self._config.slo_ms, arrival.polled_ms
        return min(max(arrival.event.ts_ms, polled_ms - slo_ms // 2), polled_ms) + slo_ms

    def _enqueue(self, entry: Entry) -> None:
        lane = entry.arrivals[0].strategy or "", self._bucket(entry)
        heapq.heappush(self._lanes.setdefault(lane, []), (entry.deadline_ms, entry.order, entry))

    def _bucket(self, entry: Entry) -> int:
        index = bisect_left(self._buckets, len(entry.ring) // EVENT_BYTES)
        return self._buckets[min(index, len(self._buckets) - 1)]

    def _take(self) -> Batch:
        """The earliest deadline names the rung and the bucket; shorter entries of that rung fill what room is left."""
        strategy, bucket = self._first_lane()
        batch = Batch([], bucket, strategy or None, opened_s=self._clock.monotonic())
        tokens = 0
        for entry in self._candidates(strategy, bucket):
            tokens += len(entry.ring) // EVENT_BYTES
            if batch.entries and tokens > self._config.max_tokens:
                self._enqueue(entry)
                break
            entry.taken = True
            batch.entries.append(entry)
            if len(batch.entries) == self._config.max_users:
                break
        batch.tickets = [ticket for entry in batch.entries for ticket in entry.tickets]
        self._wake()
        return batch

    def _first_lane(self) -> Lane:
        while True:
            lane = min(self._lanes, key=lambda lane: self._lanes[lane][0])
            if self._bucket(self._lanes[lane][0][2]) == lane[1]:
                return lane
            self._enqueue(self._pop(lane))  # it grew by coalescing

    def _candidates(self, strategy: str, bucket: int) -> Iterator[Entry]:
        """Pops entries of this rung that fit the bucket, earliest deadline first."""
        while lanes := [lane for lane in self._lanes if lane[0] == strategy and lane[1] <= bucket]:
            entry = self._pop(min(lanes, key=lambda lane: self._lanes[lane][0]))
            if self._bucket(entry) <= bucket:
                yield entry
            else:
                self._enqueue(entry)

    def _pop(self, lane: Lane) -> Entry:
        entry = heapq.heappop(self._lanes[lane])[2]
        if not self._lanes[lane]:
            del self._lanes[lane]
        return entry


def _alike(one: Arrival, other: Arrival) -> bool:
    """May one slate answer both? Its `covers` names one partition, and it has one rung and one length."""
    same_source = one.ticket.partition == other.ticket.partition and one.ticket.epoch == other.ticket.epoch
    return same_source and one.strategy == other.strategy and one.k == other.k
