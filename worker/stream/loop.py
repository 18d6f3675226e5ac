"""The story: one event from its topic to a slate in Kafka and Redis, and on to the committed offset.

    poll ─► ingest: decode, push to its ring ─► batcher ─► serve: rank ─► deliver: send, settle ─► commit

`poll` never waits for the others, for a paused partition must be polled too: what is admitted and not yet settled is
bounded by pausing the partitions. A ticket is opened in the ledger before anything can go wrong, and done only when
Kafka has acknowledged its slate or dead letter (or Redis the ring push, for an action that asks for no slate).
"""

import asyncio
from collections.abc import Callable, Sequence

from pipeline.records import Slate
from worker import logging, metrics
from worker.config import Config
from worker.interfaces import Arrival, Batch, Clock, DeadLetter, Ranking, Sink, Source, Store
from worker.stream.batcher import Batcher
from worker.stream.codec import Codec
from worker.stream.dead_letter_limits import DeadLetterLimits
from worker.stream.health import Pulse, Watchdog
from worker.stream.offset_committer import Offsets
from worker.stream.offset_tracker import Ledger
from worker.stream.poll_queue import Polled
from worker.stream.retry import Retry

log = logging.get("loop")
PUSHED_EVENTS = 1000  # at once, within one `redis.timeout_s`: a backlog in one piece would never be pushed in time
POLL_S = 0.2  # how late a stop or a resume may be noticed; new records end the wait at once

Audience = Callable[[Batch, Sequence[Slate]], None]


class Worker:
    """Runs until the source is exhausted or `stop` is called, then drains. Raises what repeating cannot mend."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        source: Source,
        store: Store,
        ranker: Ranking,
        sink: Sink,
        pulse: Pulse,
        audience: Audience = lambda batch, slates: None,
    ) -> None:
        self.config, self.source, self.store, self.ranker, self.sink = config, source, store, ranker, sink
        self.pulse, self.audience = pulse, audience
        self.codec = Codec(config, clock)
        self.limits = DeadLetterLimits(config.dead_letters)
        self.ledger = Ledger(clock)
        self.offsets = Offsets(config.health, self.ledger, source, store.forget)
        self.batcher = Batcher(config.batcher, clock)
        self.watchdog = Watchdog(config.health, self.ledger, source, pulse, clock)
        self.persist, self.polled = Retry(config.redis.retry_s, pulse), Polled()
        self.in_flight = asyncio.Semaphore(config.batcher.in_flight)
        self.stopping, self.buried_count = False, 0

    def stop(self) -> None:
        """Take no more records, be not ready; answer what was admitted, commit, return from `run`."""
        self.stopping = True
        self.pulse.problems["worker"] = "draining"

    async def run(self) -> None:
        await self.source.start(self.offsets)
        self.pulse.ready = True
        try:
            async with asyncio.TaskGroup() as tasks:
                around = [tasks.create_task(self.offsets.run(), name="commit")]
                around += [tasks.create_task(self.watchdog.run(), name="watchdog")]
                work = [tasks.create_task(self.ingest(), name="ingest"), tasks.create_task(self.serve(), name="serve")]
                await self.poll()
                await self.drain(work)
                for task in around:
                    task.cancel()
        finally:
            self.pulse.ready = False
            await self.source.stop()

    async def poll(self) -> None:
        while not (self.stopping or self.source.exhausted):
            self.balance()
            if fetched := await self.source.poll(POLL_S):
                for part in fetched:
                    self.ledger.open(part)
                self.polled.put(fetched)
        self.polled.close()

    async def ingest(self) -> None:
        while polls := await self.polled.take():
            arrivals: list[Arrival] = []
            for fetched in polls:  # the limits of dead letters are of single polls
                good, letters = self.codec.decode_all(fetched)
                await self.bury(letters, among=len(good) + len(letters))
                arrivals += good
            await self.push(arrivals)
            self.batcher.add(arrival for arrival in arrivals if arrival.trigger)
        self.batcher.close()

    async def serve(self) -> None:
        async with asyncio.TaskGroup() as deliveries:
            await self.in_flight.acquire()  # first: until a batch can be ranked its entries still take events
            while batch := await self.batcher.next():
                slates = await self.ranker.rank(batch)
                deliveries.create_task(self.deliver(batch, slates), name="deliver")
                await self.in_flight.acquire()
            self.in_flight.release()

    async def deliver(self, batch: Batch, slates: list[Slate]) -> None:
        await self.persist(self.sink.send, slates)
        self.audience(batch, slates)
        self.ledger.done(batch.tickets)
        self.batcher.finish(batch)
        self.in_flight.release()
        metrics.SLATES.labels(slates[0].strategy).inc(len(slates))

    async def push(self, arrivals: list[Arrival]) -> None:
        for start in range(0, len(arrivals), PUSHED_EVENTS):
            await self.persist(self.store.push, arrivals[start : start + PUSHED_EVENTS])
        if arrivals:
            await self.ranker.observe(arrivals)
            metrics.EVENTS.inc(len(arrivals))
            metrics.REPLAYED.inc(sum(not arrival.fresh for arrival in arrivals))
            self.ledger.done([arrival.ticket for arrival in arrivals if not arrival.trigger])

    async def bury(self, letters: list[DeadLetter], among: int) -> None:
        if letters:
            await self.persist(self.sink.bury, letters)
            self.ledger.done([letter.ticket for letter in letters])
            self.buried_count += len(letters)
            metrics.DEAD_LETTERS.inc(len(letters))
        self.limits.count(among, letters)

    def balance(self) -> None:
        """Backpressure, with a gap between its two marks so that partitions do not flutter."""
        if self.ledger.open_count >= self.config.batcher.max_pending:
            self.source.pause()
            metrics.PAUSED.set(1)
        elif self.ledger.open_count <= self.config.batcher.max_pending // 2:
            self.source.resume()
            metrics.PAUSED.set(0)

    async def drain(self, work: Sequence[asyncio.Task]) -> None:
        """Let what was admitted be answered, a stopped worker within `drain_s`; the rest is read again next time."""
        _, late = await asyncio.wait(work, timeout=self.config.health.drain_s if self.stopping else None)
        if late:
            log.warning("not all was answered in time; it is read again by the next owner", open=self.ledger.open_count)
        for task in late:
            task.cancel()
        await self.offsets.commit()
