"""Every record of a log is read once, as an event or as a bad record with its reason."""

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
@settings(max_examples=40)
@given(log=st.lists(events, max_size=6))
def test_written_log_is_read_back_unchanged(suffix: str, log: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"log.{suffix}"
        if suffix.startswith("tsv") and any(map(has_outer_blanks, log)):
            with pytest.raises(LogFileError, match="begins or ends with a blank"):
                write_log(path, iter(log))
            return
        assert write_log(path, iter(log)) == len(log)
        assert list(read_log(path)) == log


@pytest.mark.parametrize("suffix", ["jsonl", "msgpack", "tsv", "tsv.gz"])
@pytest.mark.parametrize("user_id", ["\ufeff", "\ufeffu", '\ufeff"u"', "\ufeff\ufeffu"])
def test_byte_order_mark_that_begins_an_id_is_kept(user_id: str, suffix: str, tmp_path: Path) -> None:
    log = [Event(user_id, "i", "view", 1), Event("u", "\ufeffi", "view", 2), Event(user_id, "i", "view", 3)]
    write_log(tmp_path / f"log.{suffix}", log)
    assert list(read_log(tmp_path / f"log.{suffix}")) == log


def has_outer_blanks(event: Event) -> bool:
    texts = (event.user_id, event.item_id, event.action, event.session_id or "", event.device or "")
    return any(text != text.strip(" ") for text in texts)


@pytest.mark.parametrize("suffix", ["jsonl", "msgpack", "tsv"])
def test_format_is_detected_by_content_without_a_suffix(suffix: str, tmp_path: Path) -> None:
    write_log(tmp_path / f"log.{suffix}", [EVENT])
    raw = (tmp_path / f"log.{suffix}").read_bytes()
    for content in (raw, gzip.compress(raw)):
        path = _write(tmp_path / "log", content)
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
def test_bad_line_is_yielded_in_order_with_number_and_reason(bad: bytes, reason: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", LINE + b"\n" + bad + b"\n" + LINE)
    first, bad_record, last = read_log(path)
    assert first == last == EVENT
    assert isinstance(bad_record, BadRecord)
    assert (bad_record.line, bad_record.raw) == (3, bad)
    assert reason in bad_record.reason


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", LINE.rstrip().removesuffix(b"}") + b', "colour": {"a": 1}}')
    assert list(read_log(path)) == [EVENT]


def test_last_line_without_line_break_is_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") + LINE.rstrip())
    assert list(read_log(path)) == [EVENT, EVENT]


@pytest.mark.parametrize("suffix", ["jsonl", "msgpack"])
def test_records_across_chunks_are_complete_and_numbered(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", 100)
    log = [Event("u" * n, "i" * 70, "view", n) for n in range(1, 250)]
    write_log(tmp_path / f"log.{suffix}", log)
    with (tmp_path / f"log.{suffix}").open("ab") as file:
        file.write(b"\x07\n")
    *read, last = read_log(tmp_path / f"log.{suffix}")
    assert isinstance(last, BadRecord)
    assert (read[: len(log)], last.line) == (log, 251 if suffix == "msgpack" else 250)


def test_truncated_gzip_ends_in_a_bad_record(tmp_path: Path) -> None:
    log = [Event(f"u{n * 7919 % 10_007}", f"i{n}", "view", n) for n in range(20_000)]
    write_log(tmp_path / "full.jsonl.gz", log)
    full = (tmp_path / "full.jsonl.gz").read_bytes()
    *read, last = read_log(_write(tmp_path / "truncated.jsonl.gz", full[: len(full) // 2]))
    assert len(read) > 5000
    assert read == log[: len(read)]
    assert isinstance(last, BadRecord)
    assert (last.line, last.reason[:19]) == (len(read) + 1, "the file ends early")


def test_corrupt_messagepack_ends_in_a_bad_record_with_the_rest(tmp_path: Path) -> None:
    packed = msgspec.msgpack.encode(EVENT)
    assert list(read_log(_write(tmp_path / "a.msgpack", packed + packed[:9]))) == [
        EVENT,
        BadRecord(2, packed[:9], "the file ends within this record"),
    ]
    event, rest = read_log(_write(tmp_path / "b.msgpack", packed + b"\xc1" + packed))
    assert isinstance(rest, BadRecord)
    assert (event, rest.raw, rest.line) == (EVENT, b"\xc1" + packed, 2)


def test_infinite_value_in_messagepack_is_a_bad_record(tmp_path: Path) -> None:
    raw = msgspec.msgpack.encode({**msgspec.to_builtins(EVENT), "value": math.inf})
    (entry,) = read_log(_write(tmp_path / "log.msgpack", raw))
    assert isinstance(entry, BadRecord)
    assert (entry.line, entry.raw) == (1, raw)
    assert entry.reason.endswith("at `$.value`")


@pytest.mark.parametrize("field", ["dwell_ms", "position", "context"])
def test_integer_beyond_64_bits_is_a_bad_record_and_the_log_can_be_sorted_on_disk(field: str, tmp_path: Path) -> None:
    number = 99_999_999_999_999_999_999_999
    raw = msgspec.json.encode({**msgspec.to_builtins(EVENT), field: {"a": 1}}).rstrip(b"}")
    bad = raw.replace(b'{"a":1', b'{"a":%d}}' % number if field == "context" else b"%d}" % number)
    path = _write(tmp_path / "log.jsonl", LINE + bad + b"\n" + LINE)
    first, entry, last = read_log_by_time(path, run_entries=1)
    assert first == last == EVENT
    assert isinstance(entry, BadRecord)
    assert (entry.line, entry.raw) == (2, bad)
    assert f"$.{field}" in entry.reason


def test_unreadable_file_fails_at_once(tmp_path: Path) -> None:
    for name, content, message in [
        ("log.jsonl.gz", b"plain", "not gzipped"),
        ("log.jsonl.gz", b"\x1f\x8b\x08\x00rest", "cannot be read"),
        ("log", b"\x00\x01\x02", "neither"),
        ("log.json", b'[{"user_id": 1}]', "JSON array"),
    ]:
        with pytest.raises(LogFileError, match=message):
            read_log(_write(tmp_path / name, content))
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(LogFileError, match="cannot be read"):
            read_log_by_time(path)
    with pytest.raises(LogFileError, match=r"--columns is for delimited text"):
        read_log(_write(tmp_path / "log.jsonl", LINE), LogLayout.parse("user,item,ts"))


@pytest.mark.parametrize("options", [{"separator": ";"}, {"unit": "s"}, {"header": True}, {"header": False}])
def test_options_of_delimited_text_are_refused_for_other_formats(options: dict, tmp_path: Path) -> None:
    columns = {} if options.get("header") is not False else {"columns": "user,item"}
    with pytest.raises(LogFileError, match="is for delimited text"):
        read_log(_write(tmp_path / "log.jsonl", LINE), LogLayout.parse(**options, **columns))


def test_empty_file_is_an_empty_log(tmp_path: Path) -> None:
    for name in ("log.jsonl", "log.msgpack", "log.tsv", "log.jsonl.gz", "log"):
        assert list(read_log(_write(tmp_path / name, b""))) == []


def test_unwritable_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match=r"ends in \.jsonl"):
        write_log(tmp_path / "log.parquet", [EVENT])
    with pytest.raises(LogFileError, match="cannot be written"):
        write_log(tmp_path / "no" / "log.jsonl", [EVENT])
    with pytest.raises(LogFileError, match="contains a tab or a line break"):
        write_log(tmp_path / "log.tsv", [Event("a\tb", "i1", "view", 1)])


def test_equal_events_give_equal_gzipped_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_log(tmp_path / name, [EVENT])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
