"""The worker's turns, one by one, between seams that do as the test says."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.records import EVENT_BYTES, Covers, Event, Latency, Slate
from worker.clock import VirtualClock
from worker.config import BatcherConfig, Config
from worker.interfaces import Batch, ConsumedEvent, DeadLetter, Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogSource
from worker.stream.health import HealthState
from worker.stream.loop import PUSH_CHUNK_EVENTS, Worker

PARTITION = Partition("events", 0)


def consumed(user: str, offset: int) -> ConsumedEvent:
    ring = b"\1" * EVENT_BYTES
    return ConsumedEvent(
        Event(user, "item", "view", 0), b"", RecordOffset(PARTITION, 1, offset), offset + 1, 0, 0.0, ring=ring
    )


@dataclass
class Seams:
    """Store, Ranking and Sink in one: remembers what it was given; `open` lets slates through."""

    pushed: list[list[ConsumedEvent]] = field(default_factory=list)
    observed: list[list[ConsumedEvent]] = field(default_factory=list)
    sent: list[Slate] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def push(self, arrivals: Sequence[ConsumedEvent]) -> None:
        self.pushed.append(list(arrivals))

    def forget(self, partition: Partition) -> None: ...

    async def observe(self, arrivals: Sequence[ConsumedEvent]) -> None:
        self.observed.append(list(arrivals))

    async def rank(self, batch: Batch) -> list[Slate]:
        covers = [Covers("events", 0, 0, 0, len(entry.events), 0) for entry in batch.entries]
        users = [entry.user_id for entry in batch.entries]
        return [Slate(user, [], "simple", "", each, 0, Latency()) for user, each in zip(users, covers, strict=True)]

    async def send(self, slates: Sequence[Slate]) -> None:
        await self.open.wait()
        self.sent += slates

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None: ...


class Watched(LogSource):
    """Counts what was polled, and the polls that gave nothing."""

    polled_count, empty_count = 0, 0

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        fetched = await super().poll(timeout_s)
        self.polled_count += sum(len(part.records) for part in fetched)
        self.empty_count += not fetched
        return fetched


def working(config: Config, log: Sequence[Event] = (), poll_records: int = 1) -> tuple[Worker, Seams, Watched]:
    clock, seams = VirtualClock(), Seams()
    source = Watched(iter(log), clock, "log", poll_records)
    return Worker(config, clock, source, seams, seams, seams, HealthState(clock)), seams, source


def test_a_backlog_is_pushed_in_pieces_in_its_order(run):
    async def scenario() -> None:
        worker, seams, _ = working(Config())
        arrivals = [consumed(f"u{n % 7}", n) for n in range(2 * PUSH_CHUNK_EVENTS + 500)]
        await worker.push(arrivals)
        assert [len(piece) for piece in seams.pushed] == [PUSH_CHUNK_EVENTS, PUSH_CHUNK_EVENTS, 500]
        assert [each for piece in seams.pushed for each in piece] == arrivals
        assert seams.observed == [arrivals]

    run(scenario())


def test_entries_take_events_as_long_as_no_batch_can_be_ranked(run, eventually):
    async def scenario() -> None:
        worker, seams, _ = working(Config(batcher=BatcherConfig(max_in_flight_batches=1)))
        serving = asyncio.create_task(worker.serve())
        worker.batcher.add([consumed("first", 0)])
        await eventually(worker.in_flight.locked)
        for offset in (1, 2, 3):
            worker.batcher.add([consumed("second", offset)])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        seams.open.set()
        worker.batcher.close()
        await serving
        assert [(slate.user_id, slate.covers.count) for slate in seams.sent] == [("first", 1), ("second", 3)]
        assert not worker.in_flight.locked()

    run(scenario())


def test_what_is_admitted_and_unanswered_is_bounded_and_polling_goes_on_meanwhile(run, eventually):
    async def scenario() -> None:
        log = [Event(f"u{n}", "item", "view", n) for n in range(500)]
        worker, seams, source = working(Config(batcher=BatcherConfig(max_pending_events=100)), log, poll_records=30)
        running = asyncio.create_task(worker.run())
        await eventually(lambda: source.empty_count >= 2)
        assert 100 <= source.polled_count < 100 + 30
        seams.open.set()
        await running
        assert len(seams.sent) == 500

    run(scenario())


def test_a_worker_that_drains_is_not_ready():
    worker, _, _ = working(Config())
    worker.health.ready = True
    assert worker.health.serving() == (True, "serving")
    worker.stop()
    assert worker.health.serving() == (False, "worker: draining")
