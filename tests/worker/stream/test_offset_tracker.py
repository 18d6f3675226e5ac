"""Offsets are committable up to the first open record, whatever the order of completions."""

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from worker.errors import TopicRecreated
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogRecord
from worker.stream.offset_tracker import OffsetTracker

P0 = Partition("events", 0)
P1 = Partition("events", 1)


class TickingClock:
    def __init__(self) -> None:
        self.s = 0.0

    def now_ms(self) -> int:
        return 0

    def monotonic(self) -> float:
        self.s += 1.0
        return self.s


def poll(partition: Partition, assignment: int, *offsets: int) -> PolledRecords:
    return PolledRecords(
        partition, assignment, offsets[-1] + 1, 0, 0.0, [LogRecord(offset, None, b"", 0, ()) for offset in offsets]
    )


def opened(*offsets: int, assignment: int = 1) -> OffsetTracker:
    tracker = OffsetTracker(TickingClock())
    tracker.assign(P0, assignment)
    tracker.open(poll(P0, assignment, *offsets))
    return tracker


def record_offsets(*offsets: int, assignment: int = 1) -> list[RecordOffset]:
    return [RecordOffset(P0, assignment, offset) for offset in offsets]


def test_committable_offset_stops_at_the_first_open_record():
    tracker = opened(10, 11, 12, 13)
    tracker.complete(record_offsets(11, 13))
    assert tracker.committable() == {}
    tracker.complete(record_offsets(10))
    assert tracker.committable() == {P0: 12}
    tracker.complete(record_offsets(12))
    assert tracker.committable() == {P0: 14}


def test_gaps_between_offsets_do_not_block_commits():
    tracker = opened(3, 7, 100)
    tracker.complete(record_offsets(3, 7))
    assert tracker.committable() == {P0: 8}


def test_committable_offset_is_reported_once_until_it_moves():
    tracker = opened(0, 1)
    tracker.complete(record_offsets(0))
    assert tracker.committable() == {P0: 1}
    assert tracker.committable() == {}


def test_completing_twice_counts_once():
    tracker = opened(0, 1)
    tracker.complete(record_offsets(0, 0))
    tracker.complete(record_offsets(0))
    assert (tracker.open_count, tracker.completed_count) == (1, 1)


def test_completion_of_an_older_assignment_is_ignored():
    tracker = opened(0, 1)
    tracker.assign(P0, 2)
    tracker.open(poll(P0, 1, 2))
    tracker.open(poll(P0, 2, 0, 1))
    tracker.complete(record_offsets(0, 1))
    assert (tracker.committable(), tracker.open_count) == ({}, 2)
    tracker.revoke(P0)
    tracker.complete(record_offsets(0, assignment=2))
    assert (tracker.committable(), tracker.assignments(), tracker.open_count) == ({}, {}, 0)


def test_oldest_open_record_has_the_age_of_its_poll():
    tracker = opened(0, 1)
    tracker.open(poll(P0, 1, 2, 3))
    assert tracker.oldest_open_s == 1.0
    tracker.complete(record_offsets(0, 1, 3))
    assert tracker.oldest_open_s == 2.0
    tracker.complete(record_offsets(2))
    assert tracker.oldest_open_s is None


async def test_drain_ends_with_the_last_completed_record():
    tracker = opened(0, 1)
    waiting = asyncio.create_task(tracker.wait_drained([P0, P1]))
    tracker.complete(record_offsets(0))
    await asyncio.sleep(0)
    assert not waiting.done()
    tracker.complete(record_offsets(1))
    await waiting


def test_position_that_goes_back_below_open_records_is_a_re_created_topic():
    tracker = opened(5, 6)
    tracker.complete(record_offsets(5))
    with pytest.raises(TopicRecreated, match="continues at offset 0 while offset 6 is unanswered"):
        tracker.open(poll(P0, 1, 0, 1))
    assert (tracker.open_count, tracker.oldest_open_s is not None) == (1, True)
    tracker.complete(record_offsets(6))
    tracker.open(poll(P0, 1, 0, 1))
    assert tracker.open_count == 2, "without open records, a rewind reads them again"


async def test_drain_ends_when_the_partition_is_revoked():
    tracker = opened(0)
    waiting = asyncio.create_task(tracker.wait_drained([P0]))
    await asyncio.sleep(0)
    tracker.revoke(P0)
    await waiting
    assert tracker.open_count == 0


class TrackerAgainstModel(RuleBasedStateMachine):
    """The model keeps every assignment's offsets in plain sets and derives all answers from them."""

    @initialize()
    def start(self) -> None:
        self.tracker = OffsetTracker(TickingClock())
        self.assignment = 0
        self.next_offset = 0
        self.owned: dict[Partition, int] = {}
        self.opened: dict[tuple[Partition, int], set[int]] = {}
        self.completed: dict[tuple[Partition, int], set[int]] = {}
        self.reported: dict[tuple[Partition, int], int] = {}

    partitions = st.sampled_from([P0, P1])

    @rule(partition=partitions)
    def assign(self, partition: Partition) -> None:
        self.assignment += 1
        self.owned[partition] = self.assignment
        self.opened[partition, self.assignment] = set()
        self.completed[partition, self.assignment] = set()
        self.tracker.assign(partition, self.assignment)

    @rule(partition=partitions)
    def revoke(self, partition: Partition) -> None:
        self.owned.pop(partition, None)
        self.tracker.revoke(partition)

    @rule(partition=partitions, gaps=st.lists(st.integers(1, 4), min_size=1, max_size=6))
    def open(self, partition: Partition, gaps: list[int]) -> None:
        assignment = self.owned.get(partition, 0)
        offsets = [self.next_offset + sum(gaps[: n + 1]) for n in range(len(gaps))]
        self.next_offset = offsets[-1]
        if assignment:
            self.opened[partition, assignment].update(offsets)
        self.tracker.open(poll(partition, assignment, *offsets))

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        candidates = [
            RecordOffset(partition, assignment, offset)
            for (partition, assignment), all_ in self.opened.items()
            for offset in all_
        ]
        chosen = data.draw(st.lists(st.sampled_from(candidates), max_size=8)) if candidates else []
        for partition, assignment, offset in chosen:
            if self.owned.get(partition) == assignment:
                self.completed[partition, assignment].add(offset)
        self.tracker.complete(chosen)

    @rule()
    def commit(self) -> None:
        expected = {}
        for partition, assignment in self.owned.items():
            offset = self.committable(partition, assignment)
            if offset is not None and offset != self.reported.get((partition, assignment)):
                self.reported[partition, assignment] = offset
                expected[partition] = offset
        assert self.tracker.committable() == expected

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "tracker"):
            open_ = sum(len(self.opened[key] - self.completed[key]) for key in self.owned.items())
            assert self.tracker.open_count == open_
            assert self.tracker.completed_count == sum(map(len, self.completed.values()))
            assert self.tracker.assignments() == self.owned
            assert (self.tracker.oldest_open_s is None) == (open_ == 0)

    def committable(self, partition: Partition, assignment: int) -> int | None:
        opened = self.opened[partition, assignment]
        completed = self.completed[partition, assignment]
        first_open = min(opened - completed, default=self.next_offset + 1)
        return max((offset + 1 for offset in opened if offset < first_open), default=None)


TrackerAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestTrackerAgainstModel = TrackerAgainstModel.TestCase
