"""What is revoked is settled and committed first, or read again by the next owner."""

import asyncio

import pytest

from worker.clock import VirtualClock
from worker.config import HealthConfig
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.replay.log_source import LogRecord, LogSource
from worker.stream.offset_committer import OffsetCommitter
from worker.stream.offset_tracker import OffsetTracker


class Owned:
    """A partition of a log with the records 0 to 2, admitted and open."""

    def __init__(self, drain_timeout_s: float = 20.0) -> None:
        clock, self.forgotten = VirtualClock(), list[Partition]()
        self.source, self.tracker = LogSource(iter(()), clock, "log", 1), OffsetTracker(clock)
        self.partition = self.source.partition
        self.offsets = OffsetCommitter(
            HealthConfig(drain_timeout_s=drain_timeout_s), self.tracker, self.source, self.forgotten.append
        )
        self.tracker.assign(self.partition, 1)
        records = [LogRecord(offset, None, b"", 0, ()) for offset in range(3)]
        self.tracker.open(PolledRecords(self.partition, 1, 3, 0, 0.0, records))

    def settle(self, *offsets: int) -> None:
        self.tracker.complete([RecordOffset(self.partition, 1, offset) for offset in offsets])


def test_a_revoke_waits_for_what_is_open_and_commits_it(run):
    async def scenario() -> None:
        owned = Owned()
        revoking = asyncio.create_task(owned.offsets.revoked([owned.partition]))
        owned.settle(0, 1)
        done, _ = await asyncio.wait({revoking}, timeout=0.05)
        assert not done
        owned.settle(2)
        await revoking
        assert owned.source.committed == 3
        assert (owned.tracker.assignments(), owned.forgotten) == ({}, [owned.partition])

    run(scenario())


@pytest.mark.parametrize(("settled", "committed"), [((0, 2), 1), ((0, 1), 2)])
def test_a_revoke_that_cannot_wait_longer_commits_no_further_than_what_is_open(run, settled, committed):
    async def scenario() -> None:
        owned = Owned(drain_timeout_s=0.01)
        owned.settle(*settled)
        await owned.offsets.revoked([owned.partition])
        assert owned.source.committed == committed
        owned.settle(1, 2)  # too late: somebody else's now
        await owned.offsets.commit()
        assert owned.source.committed == committed
        assert (owned.tracker.assignments(), owned.tracker.open_count) == ({}, 0)

    run(scenario())
