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
from worker.interfaces import Batch, Clock, ConsumedEvent, DeadLetter, OnDelivered, Ranker, Sink, Source, Store
from worker.stream.batcher import Batcher
from worker.stream.codec import Codec
from worker.stream.dead_letter_limits import DeadLetterLimits
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

    def __post_init__(self) -> None:
        self.codec = Codec(self.config, self.clock)
        self.limits = DeadLetterLimits(self.config.dead_letters)
        self.tracker = OffsetTracker(self.clock)
        self.offsets = OffsetCommitter(self.config.health, self.tracker, self.source, self.store.forget)
        self.batcher = Batcher(self.config.batcher, self.clock)
        self.watchdog = Watchdog(self.config.health, self.tracker, self.source, self.health, self.clock)
        self.retry = Retry(self.config.redis.retry_backoff_s, self.health)
        self.poll_queue = PollQueue()
        self.in_flight = asyncio.Semaphore(self.config.batcher.max_in_flight_batches)
        self.stopping = False

    def stop(self) -> None:
        """Stop polling and report not ready; `run` answers what was admitted, commits and returns."""
        self.stopping = True
        self.health.problems["worker"] = "draining"

    async def run(self) -> None:
        await self.source.start(self.offsets)
        self.health.ready = True
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(self.offsets.run(), name="commit")]
                background += [tasks.create_task(self.watchdog.run(), name="watchdog")]
                stages = [
                    tasks.create_task(self.ingest(), name="ingest"),
                    tasks.create_task(self.serve(), name="serve"),
                ]
                await self.poll()
                await self.drain(stages)
                for task in background:
                    task.cancel()
        finally:
            self.health.ready = False
            await self.source.stop()

    async def poll(self) -> None:
        while not (self.stopping or self.source.exhausted):
            self.apply_backpressure()
            if polled := await self.source.poll(POLL_S):
                for records in polled:
                    self.tracker.open(records)
                self.poll_queue.put(polled)
        self.poll_queue.close()

    async def ingest(self) -> None:
        while polls := await self.poll_queue.take():
            events: list[ConsumedEvent] = []
            for polled in polls:  # dead-letter limits are checked per poll
                decoded, dead_letters = self.codec.decode_all(polled)
                await self.dead_letter(dead_letters, among=len(decoded) + len(dead_letters))
                events += decoded
            await self.push(events)
            self.batcher.add(event for event in events if event.trigger)
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

    def apply_backpressure(self) -> None:
        """Pause and resume partitions, with hysteresis to avoid flapping."""
        pending = max(
            self.tracker.open_count / self.config.batcher.max_pending_events,
            (self.poll_queue.value_bytes + self.batcher.ring_bytes) / (self.config.batcher.max_pending_mib << 20),
        )
        if pending >= 1:
            self.source.pause()
            metrics.PAUSED.set(1)
        elif pending <= 0.5:
            self.source.resume()
            metrics.PAUSED.set(0)

    async def drain(self, stages: Sequence[asyncio.Task]) -> None:
        """Let the stages answer what was admitted, within `drain_timeout_s` when stopped; the rest is read again."""
        _, late = await asyncio.wait(stages, timeout=self.config.health.drain_timeout_s if self.stopping else None)
        if late:
            log.warning("drain timed out: the next owner reads the rest again", open=self.tracker.open_count)
        for task in late:
            task.cancel()
        await self.offsets.commit()
