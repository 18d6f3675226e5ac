"""The worker's stages, one by one, between parts that the test controls."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from prometheus_client import REGISTRY

from pipeline.records import EVENT_BYTES, Event
from pipeline.slates import Covers, Latency, Slate
from worker.clock import VirtualClock
from worker.config import BatcherConfig, Config, EventsConfig, HealthConfig
from worker.interfaces import (
    Batch,
    ConsumedEvent,
    DeadLetter,
    Partition,
    PolledRecords,
    RebalanceListener,
    RecordOffset,
)
from worker.replay.log_source import LogRecord, LogSource
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
    push_open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.push_open.set()

    async def push(self, events: Sequence[ConsumedEvent]) -> None:
        await self.push_open.wait()
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


class RebalancingSource:
    """A log whose partition is revoked and assigned again whenever `rebalance` is called; it is read again then."""

    def __init__(self, log: Sequence[Event], poll_records: int) -> None:
        self.log = [LogRecord(n, None, msgspec.json.encode(event), 0) for n, event in enumerate(log)]
        self.poll_records = poll_records
        self.assignment = 0
        self.committed = 0
        self.position = 0
        self.paused = False

    async def start(self, rebalance: RebalanceListener) -> None:
        self.listener = rebalance
        await self.rebalance()

    async def rebalance(self) -> None:
        await self.listener.revoked([PARTITION])
        self.assignment += 1
        self.position = self.committed
        await self.listener.assigned({PARTITION: self.assignment})

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        await asyncio.sleep(0)
        records = [] if self.paused else self.log[self.position : self.position + self.poll_records]
        self.position += len(records)
        return [PolledRecords(PARTITION, self.assignment, len(self.log), 0, 0.0, records)] if records else []

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    async def commit(self, offsets: dict[Partition, int], assignments: dict[Partition, int]) -> None:
        self.committed = offsets.get(PARTITION, self.committed)

    def uncommitted(self) -> dict[Partition, int]:
        return {}

    def stalled_s(self) -> dict[Partition, float]:
        return {}

    def problem(self) -> str:
        return ""

    def lag(self) -> dict[Partition, int]:
        return {PARTITION: len(self.log) - self.position}

    @property
    def exhausted(self) -> bool:
        return self.committed == len(self.log)

    async def stop(self) -> None: ...


@pytest.mark.parametrize("stuck", ["push", "send"])
async def test_rebalances_while_a_server_is_away_neither_pile_up_events_nor_repeat_slates(stuck: str, eventually):
    log = [Event(f"u{n}", "item", "view", n) for n in range(500)]
    config = Config(
        events=EventsConfig(max_age_days=0),
        batcher=BatcherConfig(max_pending_events=100, max_users=10, max_in_flight_batches=2),
        health=HealthConfig(drain_timeout_s=0.01, commit_interval_s=0.01),
    )
    source = RebalancingSource(log, poll_records=30)
    parts = FakeParts()
    if stuck == "push":
        parts.open.set()
        parts.push_open.clear()
    worker = Worker(config, VirtualClock(), source, parts, parts, parts, HealthState(VirtualClock()))
    running = asyncio.create_task(worker.run())
    held = []
    for _ in range(6):
        await eventually(lambda: source.paused)
        await source.rebalance()
        await eventually(lambda: worker.poll_queue.record_count or source.paused)
        held.append(worker.pending)
    parts.open.set()
    parts.push_open.set()
    await running
    assert max(held) < 100 + 30
    repeated = Counter(slate.user_id for slate in parts.sent)
    assert set(repeated) == {event.user_id for event in log}
    in_flight = 2 * 10 if stuck == "send" else 0  # what was being sent is sent
    assert sum(repeated.values()) <= 500 + in_flight


async def test_worker_that_fails_commits_what_is_completed(eventually):
    log = [Event(f"u{n}", "item", "view", n) for n in range(50)]
    config = Config(
        batcher=BatcherConfig(max_users=10, max_in_flight_batches=1), health=HealthConfig(commit_interval_s=60)
    )
    worker, parts, source = build(config, log, poll_records=10)
    parts.open.set()
    rank = parts.rank

    async def rank_twice(batch: Batch) -> list[Slate]:
        if worker.tracker.completed_count >= 20:
            raise RuntimeError("broken")
        return await rank(batch)

    parts.rank = rank_twice  # type: ignore[method-assign]
    with pytest.raises(ExceptionGroup):
        await worker.run()
    assert source.committed == worker.tracker.completed_count == 20


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
