from types import SimpleNamespace

import msgspec

from pipeline.records import Event
from worker.clock import VirtualClock
from worker.config import Config
from worker.interfaces import Partition
from worker.replay.log_source import ASSIGNMENT, LogSource
from worker.stream.codec import Codec

START_MS = 1_600_000_000_000


class Hand:
    """A clock's monotonic source, moved by hand."""

    s = 100.0

    def __call__(self) -> float:
        return self.s


class Owner:
    def __init__(self) -> None:
        self.epochs: dict[Partition, int] = {}

    async def assigned(self, partitions) -> None:
        self.epochs = dict(partitions)

    async def revoked(self, partitions) -> None: ...


def event(n: int, ts_ms: int = START_MS) -> Event:
    return Event(f"u{n}", f"i{n}", "view", ts_ms, value=1.5)


def bad(raw: bytes, reason: str) -> SimpleNamespace:
    return SimpleNamespace(line=1, raw=raw, reason=reason)


async def everything(source: LogSource) -> list:
    shares = []
    while not source.exhausted:
        shares += await source.poll(0.01)
    return shares


def test_every_entry_of_the_log_passes_the_codec_in_order(run):
    async def scenario() -> None:
        clock, owner = VirtualClock(), Owner()
        log = [event(n, START_MS + 10 * n) for n in range(25)]
        source = LogSource(log, clock, "shop.jsonl", max_records=10)
        await source.start(owner)
        assert owner.epochs == {Partition("shop.jsonl", 0): ASSIGNMENT}
        shares = await everything(source)
        assert [len(share.records) for share in shares] == [10, 10, 5]
        arrivals, letters = Codec(Config(), clock).decode_all(shares)
        assert [consumed.event for consumed in arrivals] == log
        assert [consumed.record_offset.offset for consumed in arrivals] == list(range(25))
        assert not letters

    run(scenario(), timeout_s=10)


def test_what_the_reader_could_not_read_is_buried_with_its_reason(run):
    async def scenario() -> None:
        clock = VirtualClock()
        source = LogSource([event(0), bad(b"a,b", "line 2: two columns; wanted four"), event(1)], clock)
        arrivals, letters = Codec(Config(), clock).decode_all(await everything(source))
        assert [consumed.record_offset.offset for consumed in arrivals] == [0, 2]
        assert [(letter.value, letter.reason) for letter in letters] == [(b"a,b", "line 2: two columns; wanted four")]

    run(scenario(), timeout_s=10)


def test_at_full_speed_the_clock_shows_the_last_event_polled(run):
    async def scenario() -> None:
        clock = VirtualClock(None)
        source = LogSource([event(0), event(1, START_MS + 5000), event(2, START_MS + 9000)], clock, max_records=2)
        first, *_ = await source.poll(0.01)
        assert (clock.now_ms(), first.polled_ms) == (START_MS + 5000, START_MS + 5000)

    run(scenario(), timeout_s=10)


def test_at_a_speed_events_come_when_the_log_says(run):
    async def scenario() -> None:
        hand = Hand()
        clock = VirtualClock(10.0, hand)
        source = LogSource([event(0), event(1, START_MS + 1000), event(2, START_MS + 60_000)], clock)
        assert [record.offset for share in await source.poll(0.0) for record in share.records] == [0]
        assert await source.poll(0.0) == []
        assert source.lag() == {source.partition: 0}
        hand.s += 0.1
        assert [record.offset for share in await source.poll(0.0) for record in share.records] == [1]
        assert clock.now_ms() == START_MS + 1000
        assert not source.exhausted

    run(scenario(), timeout_s=10)


def test_bad_records_before_the_first_event_do_not_set_the_clock(run):
    async def scenario() -> None:
        hand = Hand()
        clock = VirtualClock(10.0, hand)
        log = [bad(b"1", "no"), bad(b"2", "no"), event(0), event(1, START_MS + 1000)]
        source = LogSource(log, clock, max_records=2)
        offsets = [record.offset for _ in range(3) for share in await source.poll(0.0) for record in share.records]
        assert offsets == [0, 1, 2]
        assert clock.now_ms() == START_MS

    run(scenario(), timeout_s=10)


def test_a_recorded_file_is_read_in_event_time_order(run, tmp_path):
    async def scenario() -> None:
        path = tmp_path / "shop.jsonl"
        late, early = event(1, START_MS + 9000), event(2, START_MS)
        path.write_bytes(b"\n".join([msgspec.json.encode(late), b"{", msgspec.json.encode(early)]))
        source = LogSource.open(path, clock := VirtualClock())
        arrivals, letters = Codec(Config(), clock).decode_all(await everything(source))
        assert [letter.value for letter in letters] == [b"{"]
        assert [consumed.event for consumed in arrivals] == [early, late]

    run(scenario(), timeout_s=20)


def test_paused_it_gives_nothing_and_counts_its_lag(run):
    async def scenario() -> None:
        source = LogSource([event(n) for n in range(5)], VirtualClock(), max_records=3)
        source.pause()
        assert await source.poll(0.0) == []
        assert source.lag() == {source.partition: 3}
        source.resume()
        assert sum(len(share.records) for share in await everything(source)) == 5

    run(scenario(), timeout_s=10)


def test_an_empty_log_is_exhausted_after_a_poll(run):
    async def scenario() -> None:
        source = LogSource([], VirtualClock())
        assert await source.poll(0.0) == []
        assert source.exhausted

    run(scenario(), timeout_s=10)


def test_a_standing_clock_never_goes_back():
    clock = VirtualClock()
    clock.put(START_MS)
    clock.put(START_MS - 1)
    assert clock.now_ms() == START_MS
