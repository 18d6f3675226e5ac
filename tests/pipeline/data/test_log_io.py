"""Logs are read whole: every record comes once, as the event that it holds or with the reason why it holds none."""

import gzip
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.log_io import BadRecord, LogLayout, read_log, read_log_by_time, write_log
from pipeline.errors import LogFileError
from pipeline.records import MAX_TS_MS, Event

EVENT = Event("u1", "i1", "view", 1_700_000_000_000)
LINE = msgspec.json.encode(EVENT) + b"\n"

words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
numbers = st.integers(0, 1 << 40)
events = st.builds(
    Event,
    user_id=words,
    item_id=words,
    action=words,
    ts_ms=st.integers(0, MAX_TS_MS),
    value=st.none() | st.floats(0, 1e300),
    dwell_ms=st.none() | numbers,
    session_id=st.none() | words,
    device=st.none() | words,
    position=st.none() | numbers,
    context=st.none() | st.dictionaries(words, words | numbers | st.booleans() | st.none(), min_size=1, max_size=3),
)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "msgpack", "msgpack.gz", "tsv", "tsv.gz"])
@settings(deadline=None, max_examples=40)
@given(log=st.lists(events, max_size=6))
def test_a_written_log_is_read_as_it_was(suffix: str, log: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{suffix}"
        assert write_log(path, iter(log)) == len(log)
        assert list(read_log(path)) == log


@pytest.mark.parametrize("suffix", ["jsonl", "msgpack", "tsv"])
def test_a_log_without_a_suffix_is_known_by_its_content(suffix: str, tmp_path: Path) -> None:
    write_log(tmp_path / f"log.{suffix}", [EVENT])
    for start in (lambda raw: raw, gzip.compress):
        path = _write(tmp_path / "log", start((tmp_path / f"log.{suffix}").read_bytes()))
        assert list(read_log(path)) == [EVENT]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"user_id": "u1"', "truncated"),
        (b'{"user_id": "u1", "item_id": "i1", "action": "view"}', "ts_ms"),
        (b'{"user_id": "", "item_id": "i1", "action": "view", "ts_ms": 1}', "user_id"),
        (b'{"user_id": "u1", "item_id": "%s", "action": "view", "ts_ms": 1}' % (b"x" * 10_000), "item_id"),
        (b'{"user_id": "u1", "item_id": "i1", "action": "view", "ts_ms": -1}', "ts_ms"),
        (b'{"user_id": "u1", "item_id": "i1", "action": "view", "ts_ms": 1, "value": NaN}', "(byte 74), at 'NaN}'"),
        (b'{"user_id": "u1", "item_id": "i1", "action": "view", "ts_ms": 1, "value": 1e999}', "value"),
        (b'{"user_id": "u1", "item_id": "\xff", "action": "view", "ts_ms": 1}', "utf-8"),
        (b"[" * 100_000, "not an event"),
        (b"7", "object"),
    ],
)
def test_a_bad_line_comes_in_its_place_with_its_number_and_reason(bad: bytes, reason: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", LINE + b"\n" + bad + b"\n" + LINE)
    first, letter, last = read_log(path)
    assert first == last == EVENT
    assert isinstance(letter, BadRecord)
    assert (letter.line, letter.raw) == (3, bad)
    assert reason in letter.reason


def test_fields_that_no_event_has_are_passed_over(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", LINE.rstrip().removesuffix(b"}") + b', "colour": {"a": 1}}')
    assert list(read_log(path)) == [EVENT]


def test_a_last_line_without_its_line_break_is_read_too(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + LINE.rstrip())
    assert list(read_log(path)) == [EVENT, EVENT]


@pytest.mark.parametrize("suffix", ["jsonl", "msgpack"])
def test_records_across_chunks_are_whole_and_numbered(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.parser.CHUNK_BYTES", 100)
    log = [Event("u" * n, "i" * 70, "view", n) for n in range(1, 250)]
    write_log(tmp_path / f"log.{suffix}", log)
    with (tmp_path / f"log.{suffix}").open("ab") as file:
        file.write(b"\x07\n")
    *read, last = read_log(tmp_path / f"log.{suffix}")
    assert isinstance(last, BadRecord)
    assert (read[: len(log)], last.line) == (log, 251 if suffix == "msgpack" else 250)


def test_a_gzip_stream_that_breaks_off_ends_in_a_bad_record_behind_what_it_held(tmp_path: Path) -> None:
    log = [Event(f"u{n * 7919 % 10_007}", f"i{n}", "view", n) for n in range(20_000)]
    write_log(tmp_path / "whole.jsonl.gz", log)
    whole = (tmp_path / "whole.jsonl.gz").read_bytes()
    *read, last = read_log(_write(tmp_path / "cut.jsonl.gz", whole[: len(whole) // 2]))
    assert len(read) > 5000
    assert read == log[: len(read)]
    assert isinstance(last, BadRecord)
    assert (last.line, last.reason[:19]) == (len(read) + 1, "the file ends early")


def test_a_torn_messagepack_stream_ends_in_one_bad_record_that_holds_the_rest(tmp_path: Path) -> None:
    packed = msgspec.msgpack.encode(EVENT)
    assert list(read_log(_write(tmp_path / "a.msgpack", packed + packed[:9]))) == [
        EVENT,
        BadRecord(2, packed[:9], "the file ends within this record"),
    ]
    event, torn = read_log(_write(tmp_path / "b.msgpack", packed + b"\xc1" + packed))
    assert isinstance(torn, BadRecord)
    assert (event, torn.raw, torn.line) == (EVENT, b"\xc1" + packed, 2)


def test_infinity_in_messagepack_is_no_value(tmp_path: Path) -> None:
    raw = msgspec.msgpack.encode({**msgspec.to_builtins(EVENT), "value": math.inf})
    (entry,) = read_log(_write(tmp_path / "log.msgpack", raw))
    assert entry == BadRecord(1, raw, "value is inf; want a finite number of at least 0")


def test_a_file_that_cannot_be_read_at_all_is_one_sentence_at_once(tmp_path: Path) -> None:
    for name, content, said in [
        ("log.jsonl.gz", b"plain", "not gzipped"),
        ("log.jsonl.gz", b"\x1f\x8b\x08\x00rest", "cannot be read"),
        ("log", b"\x00\x01\x02", "neither"),
        ("log.json", b'[{"user_id": 1}]', "JSON array"),
    ]:
        with pytest.raises(LogFileError, match=said):
            read_log(_write(tmp_path / name, content))
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(LogFileError, match="cannot be read"):
            read_log_by_time(path)
    with pytest.raises(LogFileError, match=r"--columns is for delimited text"):
        read_log(_write(tmp_path / "log.jsonl", LINE), LogLayout.parse("user,item,ts"))


def test_an_empty_file_is_an_empty_log(tmp_path: Path) -> None:
    for name in ("log.jsonl", "log.msgpack", "log.tsv", "log.jsonl.gz", "log"):
        assert list(read_log(_write(tmp_path / name, b""))) == []


def test_what_a_log_cannot_be_written_as_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match=r"ends in \.jsonl"):
        write_log(tmp_path / "log.parquet", [EVENT])
    with pytest.raises(LogFileError, match="cannot be written"):
        write_log(tmp_path / "no" / "log.jsonl", [EVENT])
    with pytest.raises(LogFileError, match="contains a tab or a line break"):
        write_log(tmp_path / "log.tsv", [Event("a\tb", "i1", "view", 1)])


def test_the_same_events_give_the_same_gzipped_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_log(tmp_path / name, [EVENT])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
