"""Events are sorted by time alone: ties keep their place in the log, however much memory the sort may use."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.external_sort import sorted_by_time
from pipeline.data.layout import BadRecord, LogEntry
from pipeline.data.log_io import read_log_by_time, write_log
from pipeline.errors import LogFileError
from pipeline.records import Event

few = st.sampled_from(["1", "10", "2", "é"])
events = st.builds(Event, few, few, st.sampled_from(["view", "buy"]), st.integers(0, 3))
bad_records = st.builds(BadRecord, st.integers(1, 99), st.binary(max_size=4), st.just("reason"))


def _ts_ms(event: Event) -> int:
    return event.ts_ms


@given(st.lists(events, max_size=40), st.integers(1, 9))
def test_sort_is_stable_on_disk_and_in_memory(log: list[Event], run_entries: int) -> None:
    assert list(sorted_by_time(log, run_entries)) == sorted(log, key=_ts_ms)
    assert list(sorted_by_time(log, 1000)) == sorted(log, key=_ts_ms)


@pytest.mark.parametrize("run_entries", [1, 2, 3, 100])
def test_one_page_of_simultaneous_events_keeps_its_order_and_its_bad_records(run_entries: int) -> None:
    page: list[LogEntry] = [Event("u", item, "view", 7) for item in ("i165", "i289", "i191", "i276")]
    page.insert(2, BadRecord(3, b"", "reason"))
    before = Event("z", "i999", "view", 6)
    assert list(sorted_by_time([*page, before], run_entries)) == [before, *page]


@given(st.lists(events | bad_records, max_size=40), st.integers(1, 9))
def test_bad_records_are_all_kept_and_follow_the_first_event(log: list[LogEntry], run_entries: int) -> None:
    ordered = list(sorted_by_time(log, run_entries))
    assert sorted(map(repr, ordered)) == sorted(map(repr, log))
    first_run = log[:run_entries]
    if any(isinstance(entry, Event) for entry in first_run):
        assert isinstance(ordered[0], Event)  # bad records come after the first event
    else:
        assert ordered[: len(first_run)] == first_run


def test_bad_record_stays_after_its_event() -> None:
    late = Event("u", "i", "view", 9)
    early = Event("u", "i", "view", 1)
    first, after_late, after_early = (BadRecord(line, b"", "reason") for line in (1, 3, 5))
    log = [first, late, after_late, early, after_early]
    for run_entries in (3, 100):
        assert list(sorted_by_time(log, run_entries)) == [early, after_early, late, first, after_late]


def test_full_disk_is_a_log_file_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.external_sort.TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: SIM115
    log = [Event("u", "i", "view", n) for n in range(9)]
    with pytest.raises(LogFileError, match="No space left on device; free some space"):
        list(sorted_by_time(log, 4))


def test_twenty_runs_are_sorted_in_the_memory_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", 1 << 14)
    log = (Event(f"u{n % 101}", f"i{n}", "view", n * 7919 % 20_021) for n in range(20_000))
    write_log(tmp_path / "log.msgpack", log)
    tracemalloc.start()
    try:
        pairs = 0
        for before, after in pairwise(read_log_by_time(tmp_path / "log.msgpack", run_entries=1000)):
            assert isinstance(before, Event)
            assert isinstance(after, Event)
            assert before.ts_ms <= after.ts_ms
            pairs += 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pairs == 19_999
    assert peak_bytes < 2e6  # all events in memory are 8.7 MB
