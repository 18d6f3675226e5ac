"""A recorded log as a Source: one partition, in event-time order, as fast as its clock runs.

Every event is encoded again and goes through the same codec as one from Kafka; what the log's reader could not read
becomes a record that the codec buries with the reader's reason.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline.records import Event
from worker.clock import VirtualClock
from worker.interfaces import Partition, PolledRecords, RebalanceListener
from worker.stream.codec import UNREADABLE

if TYPE_CHECKING:
    from pipeline.data.log_io import BadRecord, LogLayout

ASSIGNMENT = 1  # a log is assigned once
# A log's length is not known before its end. Nothing in Redis lies beyond this one, so no log looks like a re-created
# topic; one that is replayed into the same Redis changes nothing, as every replay.
END_UNKNOWN = 1 << 62
NO_TIME = -1  # bad records before the first event: due at once
EVENT_HEADERS = (("content-type", b"application/msgpack"), ("schema", b"event/1"))
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class LogRecord:
    """A record outside Kafka."""

    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: Sequence[tuple[str, bytes]] = ()


class LogSource:
    """Implements Source over events in time order. The offset of a record is its place in that order."""

    def __init__(
        self, log: Iterable["Event | BadRecord"], clock: VirtualClock, name: str = "log", max_records: int = 2000
    ) -> None:
        self.partition = Partition(name, 0)
        self.committed = 0  # next offset, as a group's commit
        self._log, self._clock, self._max_records = iter(log), clock, max_records
        self._waiting: list[LogRecord] = []  # read and not yet polled
        self._offset = 0
        self._now_ms = NO_TIME  # of the last event read: dates the bad records behind it
        self._ended = self._paused = False

    @classmethod
    def open(
        cls, path: str | Path, clock: VirtualClock, layout: "LogLayout | None" = None, max_records: int = 2000
    ) -> "LogSource":
        """LogFileError when the file cannot be read at all."""
        from pipeline.data.log_io import read_log_by_time

        return cls(read_log_by_time(path, layout), clock, Path(path).name, max_records)

    async def start(self, rebalance: RebalanceListener) -> None:
        await rebalance.assigned({self.partition: ASSIGNMENT})

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        if not self._waiting and not self._ended:
            # In a thread: sorting a large log before its first event takes seconds.
            self._waiting = await asyncio.to_thread(self._read)
        due = self._due()
        if not due and not self.exhausted:
            await asyncio.sleep(timeout_s if self._paused else min(timeout_s, self._wait_s()))
            due = self._due()
        if not due:
            return []
        del self._waiting[: len(due)]
        self._put(due[-1].timestamp)
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic()
        return [PolledRecords(self.partition, ASSIGNMENT, END_UNKNOWN, now_ms, now_s, due)]

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        self.committed = offsets.get(self.partition, self.committed)

    def lag(self) -> Mapping[Partition, int]:
        """Records that are due and held back; what the clock has not reached is no lag."""
        due = bool(self._waiting) and self._wait_s() == 0
        return {self.partition: len(self._waiting) if due else 0}

    @property
    def exhausted(self) -> bool:
        return self._ended and not self._waiting

    async def stop(self) -> None:
        """Nothing to close: the reader closes its file when it is dropped."""

    def _read(self) -> list[LogRecord]:
        records = [self._record(entry) for entry in islice(self._log, self._max_records)]
        self._ended = len(records) < self._max_records
        return records

    def _record(self, entry: "Event | BadRecord") -> LogRecord:
        offset, self._offset = self._offset, self._offset + 1
        if isinstance(entry, Event):
            self._now_ms = entry.ts_ms
            return LogRecord(offset, entry.user_id.encode(), _encode(entry), entry.ts_ms, EVENT_HEADERS)
        return LogRecord(offset, None, entry.raw, self._now_ms, ((UNREADABLE, entry.reason.encode()),))

    def _due(self) -> list[LogRecord]:
        if self._paused or not self._waiting:
            return []
        if self._clock.speed is None:
            return self._waiting[:]
        # The first event starts a running clock.
        self._put(next((each.timestamp for each in self._waiting if each.timestamp != NO_TIME), NO_TIME))
        return list(_until(self._waiting, self._clock.now_ms()))

    def _put(self, ts_ms: int) -> None:
        if ts_ms != NO_TIME:
            self._clock.put(ts_ms)

    def _wait_s(self) -> float:
        return self._clock.wait_s(self._waiting[0].timestamp) if self._waiting else 0.0


def _until(records: list[LogRecord], now_ms: int) -> Iterator[LogRecord]:
    for record in records:
        if record.timestamp > now_ms:
            return
        yield record
