"""Track completed offsets, and how far each partition may be committed.

The committable offset of a partition is one past the newest record before which nothing is open. Offsets may have gaps
(transaction markers, compaction): only records that were opened count. An assignment is one ownership of a partition;
a completion from an older one is ignored.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.errors import TopicRecreated
from worker.interfaces import Clock, Partition, PolledRecords, RecordOffset


@dataclass(slots=True)
class _PartitionOffsets:
    """One partition in one assignment."""

    assignment: int
    order: deque[int] = field(default_factory=deque)  # offsets from the committable one on, as they were opened
    open: set[int] = field(default_factory=set)
    polls: deque[tuple[int, float]] = field(default_factory=deque)  # (last offset, opened_s): one age per poll
    committable: int | None = None
    last_reported: int | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # nothing is open

    def advance(self) -> None:
        while self.order and self.order[0] not in self.open:
            self.committable = self.order.popleft() + 1
            while self.polls and self.polls[0][0] < self.committable:
                self.polls.popleft()
        if not self.open:
            self.idle.set()


class OffsetTracker:
    """Opens and completes a record in constant time. For the tasks of one event loop; no method blocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._partitions: dict[Partition, _PartitionOffsets] = {}
        self.open_count = 0
        self.completed_count = 0

    def assign(self, partition: Partition, assignment: int) -> None:
        """Take over the partition, forgetting what an earlier assignment left open."""
        self.revoke(partition)
        self._partitions[partition] = _PartitionOffsets(assignment)
        self._partitions[partition].idle.set()

    def revoke(self, partition: Partition) -> None:
        """Drop the partition and wake anyone waiting for it to drain."""
        if offsets := self._partitions.pop(partition, None):
            self.open_count -= len(offsets.open)
            offsets.open.clear()
            offsets.idle.set()

    def owns(self, partition: Partition, assignment: int) -> bool:
        """Whether this is the partition's current assignment. Work for an earlier one is void: it is read again."""
        offsets = self._partitions.get(partition)
        return offsets is not None and offsets.assignment == assignment

    def open(self, polled: PolledRecords) -> None:
        """Open a poll's records, in their order, before anything is done with them.

        TopicRecreated when they lie before open ones: completions could not tell the old offsets from the new.
        """
        if not self.owns(polled.partition, polled.assignment) or not polled.records:
            return
        offsets = self._partitions[polled.partition]
        opened = [record.offset for record in polled.records]
        if offsets.order and opened[0] <= offsets.order[-1]:
            topic, partition = polled.partition
            raise TopicRecreated(
                f"{topic}-{partition} continues at offset {opened[0]} while offset {offsets.order[-1]} is unanswered: "
                f"the topic was re-created; change sequences.topic_generation"
            )
        self.open_count -= len(offsets.open)
        offsets.order.extend(opened)
        offsets.open.update(opened)
        self.open_count += len(offsets.open)
        offsets.polls.append((opened[-1], self._clock.monotonic()))
        offsets.idle.clear()

    def complete(self, record_offsets: Iterable[RecordOffset]) -> None:
        """Complete records. A repetition is harmless; offsets of another assignment are ignored."""
        touched: dict[Partition, _PartitionOffsets] = {}
        for partition, assignment, offset in record_offsets:
            offsets = self._partitions.get(partition)
            if offsets is not None and offsets.assignment == assignment and offset in offsets.open:
                offsets.open.remove(offset)
                self.open_count -= 1
                self.completed_count += 1
                touched[partition] = offsets
        for offsets in touched.values():
            offsets.advance()

    def committable(self) -> dict[Partition, int]:
        """Return the next offsets to commit, of the partitions where they have moved since the last call."""
        moved = {}
        for partition, offsets in self._partitions.items():
            if offsets.committable is not None and offsets.committable != offsets.last_reported:
                offsets.last_reported = offsets.committable
                moved[partition] = offsets.committable
        return moved

    def assignments(self) -> dict[Partition, int]:
        """Return the current assignment of each owned partition."""
        return {partition: offsets.assignment for partition, offsets in self._partitions.items()}

    @property
    def oldest_open_s(self) -> float | None:
        """Clock.monotonic() at which the oldest open record was opened; None when nothing is open."""
        return min((offsets.polls[0][1] for offsets in self._partitions.values() if offsets.open), default=None)

    async def wait_drained(self, partitions: Iterable[Partition]) -> None:
        """Return when nothing of these partitions is open, or they are revoked. The caller sets the deadline."""
        waited = [self._partitions[partition] for partition in partitions if partition in self._partitions]
        while busy := [offsets for offsets in waited if offsets.open]:
            await busy[0].idle.wait()
