"""Event-time order is one order, however little memory it has to be made in."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.external_sort import sorted_by_time
from pipeline.data.layout import BadRecord, LogEntry
from pipeline.data.log_io import read_log_by_time, write_log
from pipeline.errors import LogFileError
from pipeline.records import Event

few = st.sampled_from(["1", "10", "2", "é"])
events = st.builds(Event, few, few, st.sampled_from(["view", "buy"]), st.integers(0, 3))
bad_records = st.builds(BadRecord, st.integers(1, 99), st.binary(max_size=4), st.just("why"))


def _key(event: Event) -> tuple[int, str, str]:
    return event.ts_ms, event.user_id, event.item_id


@settings(deadline=None)
@given(st.lists(events, max_size=40), st.integers(1, 9))
def test_runs_on_disk_and_one_in_memory_give_the_stable_order(log: list[Event], run_entries: int) -> None:
    assert list(sorted_by_time(log, run_entries)) == sorted(log, key=_key)
    assert list(sorted_by_time(log, 1000)) == sorted(log, key=_key)


@settings(deadline=None)
@given(st.lists(events | bad_records, max_size=40), st.integers(1, 9))
def test_bad_records_are_all_there_and_stand_behind_their_event(log: list[LogEntry], run_entries: int) -> None:
    ordered = list(sorted_by_time(log, run_entries))
    assert sorted(map(repr, ordered)) == sorted(map(repr, log))
    ahead = [entry for entry, _ in zip(log, range(run_entries), strict=False) if isinstance(entry, BadRecord)]
    if any(isinstance(entry, Event) for entry in log[:run_entries]):
        assert isinstance(ordered[0], Event)  # no bad record has to be dated before the log begins
    else:
        assert ordered[: len(ahead)] == ahead


def test_a_bad_record_keeps_its_neighbour_in_time() -> None:
    late, early = Event("u", "i", "view", 9), Event("u", "i", "view", 1)
    first, behind_late, behind_early = (BadRecord(line, b"", "why") for line in (1, 3, 5))
    log = [first, late, behind_late, early, behind_early]
    for run_entries in (3, 100):
        assert list(sorted_by_time(log, run_entries)) == [early, behind_early, late, first, behind_late]


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.external_sort.TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: SIM115
    log = [Event("u", "i", "view", n) for n in range(9)]
    with pytest.raises(LogFileError, match="No space left on device; free some space"):
        list(sorted_by_time(log, 4))


def test_a_log_of_twenty_runs_is_sorted_in_the_memory_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.parser.CHUNK_BYTES", 1 << 14)
    log = (Event(f"u{n % 101}", f"i{n}", "view", n * 7919 % 20_021) for n in range(20_000))
    write_log(tmp_path / "log.msgpack", log)
    tracemalloc.start()
    try:
        seen = 0
        for before, after in pairwise(read_log_by_time(tmp_path / "log.msgpack", run_entries=1000)):
            assert isinstance(before, Event)
            assert isinstance(after, Event)
            assert _key(before) <= _key(after)
            seen += 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 19_999
    assert peak_bytes < 2e6  # in memory all of them are 8.7 MB
