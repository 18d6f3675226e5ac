"""The worker's turns, one by one, between seams that do as the test says."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.records import EVENT_BYTES, Covers, Event, Latency, Slate
from worker.clock import VirtualClock
from worker.config import Batcher, Config
from worker.health import Pulse
from worker.logsource import LogSource
from worker.loop import PUSHED_EVENTS, Worker
from worker.seams import Arrival, Batch, DeadLetter, Partition, Ticket

PARTITION = Partition("events", 0)


def arrival(user: str, offset: int) -> Arrival:
    ring = b"\1" * EVENT_BYTES
    return Arrival(Event(user, "item", "view", 0), b"", Ticket(PARTITION, 1, offset), offset + 1, 0, 0.0, ring=ring)


@dataclass
class Seams:
    """Store, Ranking and Sink in one: remembers what it was given; `open` lets slates through."""

    pushed: list[list[Arrival]] = field(default_factory=list)
    observed: list[list[Arrival]] = field(default_factory=list)
    sent: list[Slate] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def push(self, arrivals: Sequence[Arrival]) -> None:
        self.pushed.append(list(arrivals))

    def forget(self, partition: Partition) -> None: ...

    async def observe(self, arrivals: Sequence[Arrival]) -> None:
        self.observed.append(list(arrivals))

    async def rank(self, batch: Batch) -> list[Slate]:
        covers = [Covers("events", 0, 0, 0, len(entry.arrivals), 0) for entry in batch.entries]
        users = [entry.user_id for entry in batch.entries]
        return [Slate(user, [], "simple", "", each, 0, Latency()) for user, each in zip(users, covers, strict=True)]

    async def send(self, slates: Sequence[Slate]) -> None:
        await self.open.wait()
        self.sent += slates

    async def bury(self, letters: Sequence[DeadLetter]) -> None: ...


def working(config: Config) -> tuple[Worker, Seams]:
    clock, seams = VirtualClock(), Seams()
    source = LogSource(iter(()), clock, "log", 1)
    return Worker(config, clock, source, seams, seams, seams, Pulse(clock)), seams


def test_a_backlog_is_pushed_in_pieces_in_its_order(run):
    async def scenario() -> None:
        worker, seams = working(Config())
        arrivals = [arrival(f"u{n % 7}", n) for n in range(2 * PUSHED_EVENTS + 500)]
        await worker.push(arrivals)
        assert [len(piece) for piece in seams.pushed] == [PUSHED_EVENTS, PUSHED_EVENTS, 500]
        assert [each for piece in seams.pushed for each in piece] == arrivals
        assert seams.observed == [arrivals]

    run(scenario())


def test_entries_take_events_as_long_as_no_batch_can_be_ranked(run, eventually):
    async def scenario() -> None:
        worker, seams = working(Config(batcher=Batcher(in_flight=1)))
        serving = asyncio.create_task(worker.serve())
        worker.batcher.add([arrival("first", 0)])
        await eventually(worker.in_flight.locked)
        for offset in (1, 2, 3):
            worker.batcher.add([arrival("second", offset)])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        seams.open.set()
        worker.batcher.close()
        await serving
        assert [(slate.user_id, slate.covers.count) for slate in seams.sent] == [("first", 1), ("second", 3)]
        assert not worker.in_flight.locked()

    run(scenario())


def test_a_worker_that_drains_is_not_ready():
    worker, _ = working(Config())
    worker.pulse.ready = True
    assert worker.pulse.serving() == (True, "serving")
    worker.stop()
    assert worker.pulse.serving() == (False, "worker: draining")
