import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogRecord
from worker.stream.offset_tracker import OffsetTracker

P0, P1 = Partition("events", 0), Partition("events", 1)


class Ticking:
    def __init__(self) -> None:
        self.s = 0.0

    def now_ms(self) -> int:
        return 0

    def monotonic(self) -> float:
        self.s += 1.0
        return self.s


def poll(partition: Partition, epoch: int, *offsets: int) -> PolledRecords:
    return PolledRecords(
        partition, epoch, offsets[-1] + 1, 0, 0.0, [LogRecord(offset, None, b"", 0, ()) for offset in offsets]
    )


def opened(*offsets: int, epoch: int = 1) -> OffsetTracker:
    tracker = OffsetTracker(Ticking())
    tracker.assign(P0, epoch)
    tracker.open(poll(P0, epoch, *offsets))
    return tracker


def record_offsets(*offsets: int, epoch: int = 1) -> list[RecordOffset]:
    return [RecordOffset(P0, epoch, offset) for offset in offsets]


def test_the_frontier_passes_only_what_is_settled_before_it():
    tracker = opened(10, 11, 12, 13)
    tracker.complete(record_offsets(11, 13))
    assert tracker.committable() == {}
    tracker.complete(record_offsets(10))
    assert tracker.committable() == {P0: 12}
    tracker.complete(record_offsets(12))
    assert tracker.committable() == {P0: 14}


def test_gaps_between_offsets_hold_nothing_up():
    tracker = opened(3, 7, 100)
    tracker.complete(record_offsets(3, 7))
    assert tracker.committable() == {P0: 8}


def test_a_frontier_is_told_once_until_it_moves():
    tracker = opened(0, 1)
    tracker.complete(record_offsets(0))
    assert tracker.committable() == {P0: 1}
    assert tracker.committable() == {}


def test_settling_twice_counts_once():
    tracker = opened(0, 1)
    tracker.complete(record_offsets(0, 0))
    tracker.complete(record_offsets(0))
    assert (tracker.open_count, tracker.completed_count) == (1, 1)


def test_what_comes_late_for_an_older_epoch_is_ignored():
    tracker = opened(0, 1)
    tracker.assign(P0, 2)
    tracker.open(poll(P0, 1, 2))
    tracker.open(poll(P0, 2, 0, 1))
    tracker.complete(record_offsets(0, 1))
    assert (tracker.committable(), tracker.open_count) == ({}, 2)
    tracker.revoke(P0)
    tracker.complete(record_offsets(0, epoch=2))
    assert (tracker.committable(), tracker.assignments(), tracker.open_count) == ({}, {}, 0)


def test_the_oldest_open_record_is_dated_by_its_poll():
    tracker = opened(0, 1)
    tracker.open(poll(P0, 1, 2, 3))
    assert tracker.oldest_open_s == 1.0
    tracker.complete(record_offsets(0, 1, 3))
    assert tracker.oldest_open_s == 2.0
    tracker.complete(record_offsets(2))
    assert tracker.oldest_open_s is None


def test_draining_ends_when_the_last_record_is_settled(run):
    async def scenario() -> None:
        tracker = opened(0, 1)
        waiting = asyncio.create_task(tracker.wait_drained([P0, P1]))
        tracker.complete(record_offsets(0))
        await asyncio.sleep(0)
        assert not waiting.done()
        tracker.complete(record_offsets(1))
        await waiting

    run(scenario(), timeout_s=5)


def test_draining_ends_when_the_partition_is_taken_away(run):
    async def scenario() -> None:
        tracker = opened(0)
        waiting = asyncio.create_task(tracker.wait_drained([P0]))
        await asyncio.sleep(0)
        tracker.revoke(P0)
        await waiting
        assert tracker.open_count == 0

    run(scenario(), timeout_s=5)


class LedgerAgainstModel(RuleBasedStateMachine):
    """The model keeps every offset of an epoch in plain sets and derives all answers from them."""

    @initialize()
    def start(self) -> None:
        self.tracker = OffsetTracker(Ticking())
        self.epoch = 0
        self.next_offset = 0
        self.owned: dict[Partition, int] = {}
        self.seen: dict[tuple[Partition, int], set[int]] = {}
        self.settled: dict[tuple[Partition, int], set[int]] = {}
        self.told: dict[tuple[Partition, int], int] = {}

    partitions = st.sampled_from([P0, P1])

    @rule(partition=partitions)
    def assign(self, partition: Partition) -> None:
        self.epoch += 1
        self.owned[partition] = self.epoch
        self.seen[partition, self.epoch], self.settled[partition, self.epoch] = set(), set()
        self.tracker.assign(partition, self.epoch)

    @rule(partition=partitions)
    def revoke(self, partition: Partition) -> None:
        self.owned.pop(partition, None)
        self.tracker.revoke(partition)

    @rule(partition=partitions, gaps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
    def open(self, partition: Partition, gaps: list[int]) -> None:
        epoch = self.owned.get(partition, 0)
        offsets = [self.next_offset + sum(gaps[: n + 1]) for n in range(len(gaps))]
        self.next_offset = offsets[-1]
        if epoch:
            self.seen[partition, epoch].update(offsets)
        self.tracker.open(poll(partition, epoch, *offsets))

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        known = [
            RecordOffset(partition, epoch, offset) for (partition, epoch), all_ in self.seen.items() for offset in all_
        ]
        chosen = data.draw(st.lists(st.sampled_from(known), max_size=8)) if known else []
        for partition, epoch, offset in chosen:
            if self.owned.get(partition) == epoch:
                self.settled[partition, epoch].add(offset)
        self.tracker.complete(chosen)

    @rule()
    def commit(self) -> None:
        wanted = {}
        for partition, epoch in self.owned.items():
            frontier = self.frontier(partition, epoch)
            if frontier is not None and frontier != self.told.get((partition, epoch)):
                wanted[partition] = self.told[partition, epoch] = frontier
        assert self.tracker.committable() == wanted

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "tracker"):
            open_ = sum(len(self.seen[key] - self.settled[key]) for key in self.owned.items())
            assert self.tracker.open_count == open_
            assert self.tracker.completed_count == sum(map(len, self.settled.values()))
            assert self.tracker.assignments() == self.owned
            assert (self.tracker.oldest_open_s is None) == (open_ == 0)

    def frontier(self, partition: Partition, epoch: int) -> int | None:
        seen, settled = self.seen[partition, epoch], self.settled[partition, epoch]
        first_open = min(seen - settled, default=self.next_offset + 1)
        return max((offset + 1 for offset in seen if offset < first_open), default=None)


LedgerAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLedgerAgainstModel = LedgerAgainstModel.TestCase
