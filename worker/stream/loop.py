"""The story of one event: from its topic to a slate in Kafka and Redis, and on to the committed offset.

    poll ─► ingest: decode, push to its ring ─► batcher ─► serve: rank ─► deliver: send, complete ─► commit

`poll` never waits for the others, because a paused partition must be polled too: pausing bounds what is admitted and
not yet completed. An offset is opened before anything can go wrong, and completed only when Kafka has acknowledged its
slate or dead letter (or Redis its ring push, for an action that triggers no slate).
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.slates import Slate
from worker import logging, metrics
from worker.config import Config
from worker.deadline import Deadline
from worker.interfaces import (
    Batch,
    Clock,
    ConsumedEvent,
    DeadLetter,
    OnDelivered,
    Partition,
    Ranker,
    Sink,
    Source,
    Store,
)
from worker.stream.backpressure import Backpressure
from worker.stream.batcher import Batcher
from worker.stream.codec import Codec
from worker.stream.dead_letter_limits import DeadLetterLimits
from worker.stream.drain import Drain
from worker.stream.health import HealthState, Watchdog
from worker.stream.offset_committer import OffsetCommitter
from worker.stream.offset_tracker import OffsetTracker
from worker.stream.poll_queue import PollQueue
from worker.stream.retry import Retry

log = logging.get("loop")
PUSH_CHUNK_EVENTS = 1000  # per round trip: pushing a whole backlog at once would exceed `redis.timeout_s`
POLL_S = 0.2  # how late a stop or a resume may be noticed; new records end the wait at once


def ignore_delivery(batch: Batch, slates: Sequence[Slate]) -> None:
    """Do nothing: only a replay observes deliveries."""


@dataclass(eq=False)
class Worker:
    """Runs until the source is exhausted or `stop` is called, then drains. Raises any error that a retry cannot fix."""

    config: Config
    clock: Clock
    source: Source
    store: Store
    ranker: Ranker
    sink: Sink
    health: HealthState
    on_delivered: OnDelivered = ignore_delivery
    deadline: Deadline | None = None  # of the way out; None: one of its own

    def __post_init__(self) -> None:
        self.codec = Codec(self.config, self.clock)
        self.limits = DeadLetterLimits(self.config.dead_letters)
        self.tracker = OffsetTracker(self.clock)
        self.offsets = OffsetCommitter(self.config.health, self.tracker, self.source, self.forget)
        self.batcher = Batcher(self.config.batcher, self.clock)
        self.watchdog = Watchdog(self.config.health, self.tracker, self.source, self.health, self.clock)
        self.retry = Retry(self.config.redis.retry_backoff_s, self.health)
        self.poll_queue = PollQueue()
        self.backpressure = Backpressure(self.config.batcher, self.source)
        deadline = self.deadline or Deadline(self.clock)
        self.drain = Drain(self.config.health, self.tracker, self.offsets, self.source, self.health, deadline)
        self.in_flight = asyncio.Semaphore(self.config.batcher.max_in_flight_batches)
        self.ingesting = 0  # records taken from the poll queue and not yet in the batcher
        self.started = False
        self.stopping = False

    def stop(self) -> None:
        """Stop polling and report not ready; `run` answers what was admitted, commits and returns."""
        self.stopping = True
        self.drain.begin()

    async def run(self) -> None:
        """NotDrained when a stop's deadline comes first."""
        await self.source.start(self.offsets)
        self.started = self.health.ready = True
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self.offsets.run(), name="commit")]
                background += [tasks.create_task(self.watchdog.run(), name="watchdog")]
                stages = [
                    tasks.create_task(self.ingest(), name="ingest"),
                    tasks.create_task(self.serve(), name="serve"),
                ]
                await self.poll()
                await self.drain.answer(stages)
                for task in background:
                    task.cancel()
        finally:
            await self.drain.close()
        if self.limits.error:
            raise self.limits.error
        self.drain.check()

    async def poll(self) -> None:
        while not (self.stopping or self.source.exhausted):
            self.backpressure.apply(self.pending, self.poll_queue.value_bytes + self.batcher.ring_bytes)
            if polled := await self.source.poll(POLL_S):
                for records in polled:
                    self.tracker.open(records)
                self.poll_queue.put(polled)
        self.poll_queue.close()

    async def ingest(self) -> None:
        while polls := await self.poll_queue.take():
            self.ingesting = sum(len(records.records) for polled in polls for records in polled)
            events: list[ConsumedEvent] = []
            for polled in polls:  # dead-letter limits are checked per poll
                owned = [records for records in polled if self.tracker.owns(records.partition, records.assignment)]
                decoded, dead_letters = self.codec.decode_all(owned)
                await self.dead_letter(dead_letters, among=len(decoded) + len(dead_letters))
                events += decoded
            await self.push(events)
            self.batcher.add(each for each in events if each.trigger and self.tracker.owns(*each.record_offset[:2]))
            self.ingesting = 0
        self.batcher.close()

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as deliveries:
            await self.in_flight.acquire()  # before taking a batch: until then its entries can still coalesce events
            while batch := await self.batcher.next():
                slates = await self.ranker.rank(batch)
                deliveries.create_task(self.deliver(batch, slates), name="deliver")
                await self.in_flight.acquire()
            self.in_flight.release()

    async def deliver(self, batch: Batch, slates: list[Slate]) -> None:
        await self.retry(self.sink.send, slates)
        self.on_delivered(batch, slates)
        self.tracker.complete(batch.record_offsets)
        self.batcher.finish(batch)
        self.in_flight.release()
        for labels, count in Counter((slate.strategy, slate.backend, slate.why) for slate in slates).items():
            metrics.SLATES.labels(*labels).inc(count)

    async def push(self, events: list[ConsumedEvent]) -> None:
        for start in range(0, len(events), PUSH_CHUNK_EVENTS):
            await self.retry(self.store.push, events[start : start + PUSH_CHUNK_EVENTS])
        if events:
            await self.ranker.observe(events)
            metrics.EVENTS.inc(len(events))
            metrics.REDELIVERED_EVENTS.inc(sum(not event.is_new for event in events))
            self.tracker.complete(event.record_offset for event in events if not event.trigger)

    async def dead_letter(self, dead_letters: list[DeadLetter], among: int) -> None:
        if dead_letters:
            await self.retry(self.sink.send_dead_letters, dead_letters)
            self.tracker.complete(letter.record_offset for letter in dead_letters)
            metrics.DEAD_LETTERS.inc(len(dead_letters))
        self.limits.count(among, dead_letters)
        if self.limits.error:
            self.stop()

    @property
    def pending(self) -> int:
        """The records that are held; those of a passed assignment are no longer open, and still take memory."""
        held = self.poll_queue.record_count + self.ingesting + self.batcher.pending
        return max(self.tracker.open_count, held)

    def forget(self, partition: Partition) -> None:
        """Drop what is held of a partition that is no longer owned: its next owner reads it again."""
        self.store.forget(partition)
        self.poll_queue.drop(partition)
        self.batcher.drop(partition)
