"""The worker's stages, one by one, between parts that the test controls."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import REGISTRY

from pipeline.records import EVENT_BYTES, Event
from pipeline.slates import Covers, Latency, Slate
from worker.clock import VirtualClock
from worker.config import BatcherConfig, Config
from worker.interfaces import Batch, ConsumedEvent, DeadLetter, Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogSource
from worker.stream.health import HealthState
from worker.stream.loop import PUSH_CHUNK_EVENTS, Worker

PARTITION = Partition("events", 0)


def consumed(user: str, offset: int) -> ConsumedEvent:
    return ConsumedEvent(
        event=Event(user, "item", "view", 0),
        packed=b"",
        record_offset=RecordOffset(PARTITION, 1, offset),
        end_offset=offset + 1,
        polled_ms=0,
        polled_s=0.0,
        ring=b"\1" * EVENT_BYTES,
    )


def make_slate(user: str, covers: Covers) -> Slate:
    return Slate(
        user_id=user,
        items=[],
        strategy="simple",
        backend="numpy",
        why="requested",
        model_version="",
        covers=covers,
        created_ms=0,
        latency_ms=Latency(),
    )


@dataclass
class FakeParts:
    """Store, Ranker and Sink in one: remembers what it was given; slates are sent once `open` is set."""

    pushed: list[list[ConsumedEvent]] = field(default_factory=list)
    observed: list[list[ConsumedEvent]] = field(default_factory=list)
    sent: list[Slate] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def push(self, events: Sequence[ConsumedEvent]) -> None:
        self.pushed.append(list(events))

    def forget(self, partition: Partition) -> None: ...

    async def observe(self, events: Sequence[ConsumedEvent]) -> None:
        self.observed.append(list(events))

    async def rank(self, batch: Batch) -> list[Slate]:
        covers = [Covers("events", 0, 0, 0, len(entry.events), 0) for entry in batch.entries]
        users = [entry.user_id for entry in batch.entries]
        return [make_slate(user, each) for user, each in zip(users, covers, strict=True)]

    async def send(self, slates: Sequence[Slate]) -> None:
        await self.open.wait()
        self.sent += slates

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None: ...


class CountingSource(LogSource):
    """Counts the polled records and the empty polls."""

    polled_count = 0
    empty_count = 0

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        polled = await super().poll(timeout_s)
        self.polled_count += sum(len(part.records) for part in polled)
        self.empty_count += not polled
        return polled


def build(config: Config, log: Sequence[Event] = (), poll_records: int = 1) -> tuple[Worker, FakeParts, CountingSource]:
    clock = VirtualClock()
    parts = FakeParts()
    source = CountingSource(iter(log), clock, "log", poll_records)
    return Worker(config, clock, source, parts, parts, parts, HealthState(clock)), parts, source


async def test_backlog_is_pushed_in_chunks_in_order():
    worker, parts, _ = build(Config())
    events = [consumed(f"u{n % 7}", n) for n in range(2 * PUSH_CHUNK_EVENTS + 500)]
    await worker.push(events)
    assert [len(chunk) for chunk in parts.pushed] == [PUSH_CHUNK_EVENTS, PUSH_CHUNK_EVENTS, 500]
    assert [event for chunk in parts.pushed for event in chunk] == events
    assert parts.observed == [events]


async def test_entries_coalesce_events_until_a_batch_can_be_ranked(eventually):
    worker, parts, _ = build(Config(batcher=BatcherConfig(max_in_flight_batches=1)))
    serving = asyncio.create_task(worker.serve())
    worker.batcher.add([consumed("first", 0)])
    await eventually(worker.in_flight.locked)
    for offset in (1, 2, 3):
        worker.batcher.add([consumed("second", offset)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    parts.open.set()
    worker.batcher.close()
    await serving
    assert [(slate.user_id, slate.covers.count) for slate in parts.sent] == [("first", 1), ("second", 3)]
    assert not worker.in_flight.locked()


async def test_backpressure_bounds_unanswered_events_while_polling_continues(eventually):
    log = [Event(f"u{n}", "item", "view", n) for n in range(500)]
    worker, parts, source = build(Config(batcher=BatcherConfig(max_pending_events=100)), log, poll_records=30)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: source.empty_count >= 2)
    assert 100 <= source.polled_count < 100 + 30
    parts.open.set()
    await running
    assert len(parts.sent) == 500


async def test_backpressure_bounds_the_bytes_of_waiting_rings(eventually):
    log = [Event(f"u{n}", "item", "view", n) for n in range(200)]
    worker, parts, source = build(Config(batcher=BatcherConfig(max_pending_mib=1)), log)
    ring = b"\1" * (EVENT_BYTES * 5000)  # nine of them take 1 MiB

    async def push_long_rings(events: Sequence[ConsumedEvent]) -> None:
        for event in events:
            event.ring = ring

    parts.push = push_long_rings
    running = asyncio.create_task(worker.run())
    await eventually(lambda: source.empty_count >= 2)
    assert source.polled_count < 200
    parts.open.set()
    await running
    assert len(parts.sent) == 200


async def test_delivered_slates_are_counted_by_what_ranked_them_and_why():
    labels = {"strategy": "simple", "backend": "numpy", "why": "requested"}
    before = REGISTRY.get_sample_value("millrace_slates_total", labels) or 0.0
    worker, parts, _ = build(Config(), [Event(f"u{n}", "item", "view", n) for n in range(7)])
    parts.open.set()
    await worker.run()
    assert REGISTRY.get_sample_value("millrace_slates_total", labels) == before + 7


async def test_draining_worker_is_not_ready():
    worker, _, _ = build(Config())
    worker.health.ready = True
    assert worker.health.serving() == (True, "serving")
    worker.stop()
    assert worker.health.serving() == (False, "worker: draining")
