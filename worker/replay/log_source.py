"""A recorded log as a Source: one partition, in event-time order, at the speed of its clock.

Every event is encoded again and goes through the same codec as one from Kafka. An entry that the log's reader could not
read becomes a record that the codec dead-letters with the reader's reason.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import msgspec

from pipeline.records import Event
from worker.clock import VirtualClock
from worker.interfaces import Partition, PolledRecords, RebalanceListener
from worker.stream.codec import UNREADABLE

if TYPE_CHECKING:
    from pipeline.data.log_io import BadRecord

ASSIGNMENT = 1  # a log is assigned once
# A log's length is not known before its end. No offset in Redis is past this one, so no log looks like a re-created
# topic; replaying a log into the same Redis again changes nothing.
END_UNKNOWN = 1 << 62
NO_TIME = -1  # timestamp of bad records before the first event: due at once
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
    """Implements Source over entries in time order. A record's offset is its index in that order."""

    def __init__(
        self, log: Iterable["Event | BadRecord"], clock: VirtualClock, name: str = "log", max_records: int = 2000
    ) -> None:
        self.partition = Partition(name, 0)
        self.committed = 0  # next offset, as in a consumer group's commit
        self._log = iter(log)
        self._clock = clock
        self._max_records = max_records
        self._pending: list[LogRecord] = []  # read and not yet polled
        self._next_offset = 0
        self._last_ts_ms = NO_TIME  # of the last event read; bad records after it get the same
        self._ended = False
        self._paused = False

    async def start(self, rebalance: RebalanceListener) -> None:
        await rebalance.assigned({self.partition: ASSIGNMENT})

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        if not self._pending and not self._ended:
            # In a thread: sorting a large log before its first event takes seconds.
            self._pending = await asyncio.to_thread(self._read)
        due = self._due()
        if not due and not self.exhausted:
            await asyncio.sleep(timeout_s if self._paused else min(timeout_s, self._wait_s()))
            due = self._due()
        if not due:
            return []
        del self._pending[: len(due)]
        self._advance_clock(due[-1].timestamp)
        polled = PolledRecords(
            partition=self.partition,
            assignment=ASSIGNMENT,
            end_offset=END_UNKNOWN,
            polled_ms=self._clock.now_ms(),
            polled_s=self._clock.monotonic(),
            records=due,
        )
        return [polled]

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        self.committed = offsets.get(self.partition, self.committed)

    def uncommitted(self) -> Mapping[Partition, int]:
        return {}

    def stalled_s(self) -> Mapping[Partition, float]:
        """Return nothing: a file does not stall."""
        return {}

    def problem(self) -> str:
        return ""

    def lag(self) -> Mapping[Partition, int]:
        """Return the number of records read but not polled; 0 while the clock has not reached the first of them."""
        is_due = bool(self._pending) and self._wait_s() == 0
        return {self.partition: len(self._pending) if is_due else 0}

    @property
    def exhausted(self) -> bool:
        return self._ended and not self._pending

    async def stop(self) -> None:
        """Do nothing: the reader closes its file when it is garbage-collected."""

    def _read(self) -> list[LogRecord]:
        records = [self._to_record(entry) for entry in islice(self._log, self._max_records)]
        self._ended = len(records) < self._max_records
        return records

    def _to_record(self, entry: "Event | BadRecord") -> LogRecord:
        offset = self._next_offset
        self._next_offset += 1
        if isinstance(entry, Event):
            self._last_ts_ms = entry.ts_ms
            return LogRecord(offset, entry.user_id.encode(), _encode(entry), entry.ts_ms, EVENT_HEADERS)
        return LogRecord(offset, None, entry.raw, self._last_ts_ms, ((UNREADABLE, entry.reason.encode()),))

    def _due(self) -> list[LogRecord]:
        if self._paused or not self._pending:
            return []
        if self._clock.speed is None:
            return self._pending[:]
        # The first event starts a running clock.
        self._advance_clock(next((each.timestamp for each in self._pending if each.timestamp != NO_TIME), NO_TIME))
        now_ms = self._clock.now_ms()
        return list(takewhile(lambda record: record.timestamp <= now_ms, self._pending))

    def _advance_clock(self, ts_ms: int) -> None:
        if ts_ms != NO_TIME:
            self._clock.advance_to(ts_ms)

    def _wait_s(self) -> float:
        return self._clock.wait_s(self._pending[0].timestamp) if self._pending else 0.0
