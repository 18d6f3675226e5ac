"""Revoked partitions are completed and committed first; what is left open is read again by the next owner."""

import asyncio

import pytest

from worker.clock import VirtualClock
from worker.config import HealthConfig
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogRecord, LogSource
from worker.stream.offset_committer import OffsetCommitter
from worker.stream.offset_tracker import OffsetTracker


class OwnedPartition:
    """A partition of a log whose records 0 to 2 are open."""

    def __init__(self, drain_timeout_s: float = 20.0) -> None:
        clock = VirtualClock()
        config = HealthConfig(drain_timeout_s=drain_timeout_s)
        self.forgotten: list[Partition] = []
        self.source = LogSource(iter(()), clock, "log", 1)
        self.tracker = OffsetTracker(clock)
        self.partition = self.source.partition
        self.committer = OffsetCommitter(config, self.tracker, self.source, self.forgotten.append)
        self.tracker.assign(self.partition, 1)
        records = [LogRecord(offset, None, b"", 0, ()) for offset in range(3)]
        self.tracker.open(PolledRecords(self.partition, 1, 3, 0, 0.0, records))

    def complete(self, *offsets: int) -> None:
        self.tracker.complete([RecordOffset(self.partition, 1, offset) for offset in offsets])


async def test_revoke_waits_for_open_records_and_commits_them():
    owned = OwnedPartition()
    revoking = asyncio.create_task(owned.committer.revoked([owned.partition]))
    owned.complete(0, 1)
    done, _ = await asyncio.wait({revoking}, timeout=0.05)
    assert not done
    owned.complete(2)
    await revoking
    assert owned.source.committed == 3
    assert (owned.tracker.assignments(), owned.forgotten) == ({}, [owned.partition])


@pytest.mark.parametrize(("completed", "committed"), [((0, 2), 1), ((0, 1), 2)])
async def test_revoke_that_times_out_commits_up_to_the_first_open_record(completed, committed):
    owned = OwnedPartition(drain_timeout_s=0.01)
    owned.complete(*completed)
    await owned.committer.revoked([owned.partition])
    assert owned.source.committed == committed
    owned.complete(1, 2)  # too late: another member owns the partition
    await owned.committer.commit()
    assert owned.source.committed == committed
    assert (owned.tracker.assignments(), owned.tracker.open_count) == ({}, 0)
