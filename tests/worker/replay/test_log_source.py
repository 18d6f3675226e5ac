"""A recorded log as a source: order, dead letters, clock, lag."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from pipeline.data.log_io import BadRecord, read_log_by_time
from pipeline.records import Event
from worker.clock import VirtualClock
from worker.config import Config
from worker.interfaces import ConsumedEvent, DeadLetter, Partition, PolledRecords
from worker.replay.log_source import ASSIGNMENT, LogSource
from worker.stream.codec import Codec

START_MS = 1_600_000_000_000


class ManualTime:
    """A monotonic source that tests advance."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class Listener:
    """A RebalanceListener that records its assignment."""

    def __init__(self) -> None:
        self.assignments: dict[Partition, int] = {}

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        self.assignments = dict(partitions)

    async def revoked(self, partitions: Iterable[Partition]) -> None: ...


def event(n: int, ts_ms: int = START_MS) -> Event:
    return Event(f"u{n}", f"i{n}", "view", ts_ms, value=1.5)


def bad(raw: bytes, reason: str = "no") -> BadRecord:
    return BadRecord(1, raw, reason)


def offsets(polled: list[PolledRecords]) -> list[int]:
    return [record.offset for records in polled for record in records.records]


async def poll_all(source: LogSource) -> list[PolledRecords]:
    polled = []
    while not source.exhausted:
        polled += await source.poll(0.01)
    return polled


async def decode_all(source: LogSource, clock: VirtualClock) -> tuple[list[ConsumedEvent], list[DeadLetter]]:
    return Codec(Config(), clock).decode_all(await poll_all(source))


async def test_every_entry_passes_the_codec_in_order() -> None:
    clock = VirtualClock()
    listener = Listener()
    log = [event(n, START_MS + 10 * n) for n in range(25)]
    source = LogSource(log, clock, "shop.jsonl", max_records=10)
    await source.start(listener)
    assert listener.assignments == {Partition("shop.jsonl", 0): ASSIGNMENT}
    polled = await poll_all(source)
    assert [len(records.records) for records in polled] == [10, 10, 5]
    events, dead_letters = Codec(Config(), clock).decode_all(polled)
    assert [consumed.event for consumed in events] == log
    assert [consumed.record_offset.offset for consumed in events] == list(range(25))
    assert not dead_letters


async def test_unreadable_entry_is_dead_lettered_with_the_readers_reason() -> None:
    clock = VirtualClock()
    source = LogSource([event(0), bad(b"a,b", "line 2: two columns; want four"), event(1)], clock)
    events, dead_letters = await decode_all(source, clock)
    assert [consumed.record_offset.offset for consumed in events] == [0, 2]
    assert [(letter.value, letter.reason) for letter in dead_letters] == [(b"a,b", "line 2: two columns; want four")]


async def test_clock_without_speed_shows_the_last_polled_event() -> None:
    clock = VirtualClock(None)
    source = LogSource([event(0), event(1, START_MS + 5000), event(2, START_MS + 9000)], clock, max_records=2)
    first, *_ = await source.poll(0.01)
    assert (clock.now_ms(), first.polled_ms) == (START_MS + 5000, START_MS + 5000)


async def test_events_are_polled_when_a_running_clock_reaches_them() -> None:
    time = ManualTime()
    clock = VirtualClock(10.0, time)
    source = LogSource([event(0), event(1, START_MS + 1000), event(2, START_MS + 60_000)], clock)
    assert offsets(await source.poll(0.0)) == [0]
    assert await source.poll(0.0) == []
    assert source.lag() == {source.partition: 0}
    time.s += 0.1
    assert offsets(await source.poll(0.0)) == [1]
    assert clock.now_ms() == START_MS + 1000
    assert not source.exhausted


async def test_bad_records_before_the_first_event_do_not_set_the_clock() -> None:
    clock = VirtualClock(10.0, ManualTime())
    log = [bad(b"1"), bad(b"2"), event(0), event(1, START_MS + 1000)]
    source = LogSource(log, clock, max_records=2)
    assert [offset for _ in range(3) for offset in offsets(await source.poll(0.0))] == [0, 1, 2]
    assert clock.now_ms() == START_MS


async def test_recorded_file_is_read_in_event_time_order(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    late = event(1, START_MS + 9000)
    early = event(2, START_MS)
    path.write_bytes(b"\n".join([msgspec.json.encode(late), b"{", msgspec.json.encode(early)]))
    clock = VirtualClock()
    events, dead_letters = await decode_all(LogSource(read_log_by_time(path), clock), clock)
    assert [letter.value for letter in dead_letters] == [b"{"]
    assert [consumed.event for consumed in events] == [early, late]


async def test_number_that_messagepack_cannot_carry_becomes_a_dead_letter(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    good = msgspec.json.encode(event(1))
    bad = good.replace(b"}", b',"dwell_ms":99999999999999999999999}')
    path.write_bytes(b"\n".join([good, bad, good]))
    clock = VirtualClock()
    events, dead_letters = await decode_all(LogSource(read_log_by_time(path), clock), clock)
    assert [letter.value for letter in dead_letters] == [bad]
    assert "$.dwell_ms" in dead_letters[0].reason
    assert len(events) == 2


async def test_paused_source_yields_nothing_and_counts_its_lag() -> None:
    source = LogSource([event(n) for n in range(5)], VirtualClock(), max_records=3)
    source.pause()
    assert await source.poll(0.0) == []
    assert source.lag() == {source.partition: 3}
    source.resume()
    assert len(offsets(await poll_all(source))) == 5


async def test_empty_log_is_exhausted_after_one_poll() -> None:
    source = LogSource([], VirtualClock())
    assert await source.poll(0.0) == []
    assert source.exhausted


def test_clock_without_speed_never_goes_back() -> None:
    clock = VirtualClock()
    clock.advance_to(START_MS)
    clock.advance_to(START_MS - 1)
    assert clock.now_ms() == START_MS
