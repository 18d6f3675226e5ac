"""Delimited text: columns are found by header or position, and lines that do not fit give a clear reason."""

from pathlib import Path

import pytest

from pipeline.data.layout import LogEntry
from pipeline.data.log_io import BadRecord, EventLog, LogLayout, read_event_log, read_log, read_log_by_time, recognised
from pipeline.errors import LogFileError
from pipeline.records import Event

RATED = Event("196", "242", "rate", 881_250_949_000, value=3.0)


def _read(folder: Path, text: str, layout: LogLayout | None = None) -> list[LogEntry]:
    path = folder / "log.txt"
    path.write_text(text, encoding="utf-8")
    return list(read_log(path, layout))


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n", None),
        ("196::242::3::881250949\n", "user,item,value,ts"),
        ("userId,movieId,rating,timestamp\r\n196,242,3.0,881250949\r\n", None),
        ("userId,movieId,rating,timestamp\n196,242,3.0,881250949", "user,item,value,ts"),
        ("when,x,who,what,stars\n881250949000,-,196,242,3\n", "ts=when,user=who,item=what,value=stars"),
        ("\ufeffuser,item,value,ts\n\n196,242,3,881250949.0\n", None),
        ("noise,196,242,3,881250949000,more\n", "-,user,item,rating,ts"),
        ("Timestamp,PRICE,rating,user,item,action\n881250949,9,3,196,242,rate\n", None),
    ],
)
def test_columns_are_found_by_header_or_position(text: str, columns: str | None, tmp_path: Path) -> None:
    assert _read(tmp_path, text, LogLayout.parse(columns)) == [RATED]


def test_action_column_overrides_the_default_action(tmp_path: Path) -> None:
    text = "u1;i1;buy;5\nu1;i2;;6\n"
    layout = LogLayout.parse("user,item,action,ts", action="view", separator=";", unit="ms")
    assert _read(tmp_path, text, layout) == [Event("u1", "i1", "buy", 5), Event("u1", "i2", "view", 6)]


def test_given_or_named_time_unit_is_not_detected(tmp_path: Path) -> None:
    for columns, unit, ts_ms in [("user,item,ts", "ms", 7), ("user,item,ts_ms", None, 7), ("user,item,ts", "s", 7000)]:
        assert _read(tmp_path, "u1,i1,7\n", LogLayout.parse(columns, unit=unit)) == [Event("u1", "i1", "rate", ts_ms)]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("u2,i1\nu1,i9\nu1,i1\n", "user,item"),
        ("user_id,item_id\nu2,i1\nu1,i9\nu1,i1\n", "user,item"),
        ("what:token\twho:token\ni1\tu2\n\ni9\tu1\ni1\tu1", "user=who,item=what"),
    ],
)
def test_without_times_the_position_in_the_log_is_the_time(text: str, columns: str, tmp_path: Path) -> None:
    expected = [Event("u2", "i1", "rate", 0), Event("u1", "i9", "rate", 1), Event("u1", "i1", "rate", 2)]
    assert _read(tmp_path, text, LogLayout.parse(columns)) == expected
    assert list(read_log_by_time(tmp_path / "log.txt", LogLayout.parse(columns))) == expected


def test_bad_line_of_a_log_without_times_uses_up_its_position(tmp_path: Path) -> None:
    first, bad, last = _read(tmp_path, "u1,i1\nu1\nu1,i2\n", LogLayout.parse("user,item"))
    assert isinstance(bad, BadRecord)
    assert (first, last) == (Event("u1", "i1", "rate", 0), Event("u1", "i2", "rate", 2))


def test_line_order_does_not_change_the_log(tmp_path: Path) -> None:
    lines = [f"u{n % 5},i{n % 7},{1000 + 60 * n}" for n in range(40)]
    logs = []
    for order in (lines, lines[::-1], lines[20:] + lines[:20]):
        (tmp_path / "log.csv").write_text("\n".join(order))
        logs.append(read_event_log(tmp_path / "log.csv", LogLayout.parse("user,item,ts")))
    assert all((log.events == logs[0].events).all() and (log.users == logs[0].users).all() for log in logs)


def test_unreadable_records_are_counted_and_the_first_is_explained(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,action,ts,value\nu,i,view,5,1\nu,i,view,6,nan\nu,i,buy,7,1\n")
    log = read_event_log(tmp_path / "log.csv")
    assert (len(log), log.unreadable) == (1, 2)
    assert log.first_error.startswith("line 3: ")
    (tmp_path / "log.csv").write_text("user,item,action,ts,value\nu,i,buy,7,1\n")
    assert read_event_log(tmp_path / "log.csv").first_error == "the action 'buy' is not among events.actions"


def test_header_option_overrides_detection(tmp_path: Path) -> None:
    text = "1,2,3\n4,5,6\n"
    assert len(_read(tmp_path, text, LogLayout.parse("user,item,ts"))) == 2
    assert len(_read(tmp_path, text, LogLayout.parse("user,item,ts", header=True))) == 1


@pytest.mark.parametrize(
    ("text", "columns", "note"),
    [
        ("customer,sku\nu1,i1\n", "user,item", "'customer sku', is taken for a header; --no-header reads it"),
        ("kunde,artikel,zeit\nu1,i1,5\n", "user,item,ts", "'kunde artikel zeit', is taken for a header; --no-header"),
        ("kunde,artikel\nu1,i1\n", "user,item", "'kunde artikel', is taken for an event; --header skips it"),
    ],
)
def test_guess_about_the_first_line_is_said(text: str, columns: str, note: str, tmp_path: Path) -> None:
    entries = _read(tmp_path, text, LogLayout.parse(columns))
    assert len(entries) == (2 if "event" in note.partition(";")[0] else 1)
    assert note in recognised(tmp_path / "log.txt", LogLayout.parse(columns))[0]
    for header in (True, False):
        layout = LogLayout.parse(columns, header=header)
        assert len(_read(tmp_path, text, layout)) == 2 - header
        assert not any("first line" in said for said in recognised(tmp_path / "log.txt", layout))


@pytest.mark.parametrize("missing", ["", "NULL", r"\N", "-"])
def test_first_line_whose_time_is_missing_is_a_bad_record(missing: str, tmp_path: Path) -> None:
    bad, good = _read(tmp_path, f"u1,i1,{missing}\nu2,i2,5\n", LogLayout.parse("user,item,ts"))
    assert isinstance(bad, BadRecord)
    assert (bad.line, good) == (1, Event("u2", "i2", "rate", 5000))


@pytest.mark.parametrize("header", ["user,item", "user,item,ts", "\ufeffuser,item", "user, item ,ts"])
def test_header_that_is_repeated_is_no_event(header: str, tmp_path: Path) -> None:
    time = ",5" if "ts" in header else ""
    part = f"{header}\nu1,i1{time}\nu2,i2{time}\n"
    columns = "user,item,ts" if time else "user,item"
    entries = _read(tmp_path, part * 3, LogLayout.parse(columns))
    assert [(entry.user_id, entry.item_id) for entry in entries if isinstance(entry, Event)] == [
        ("u1", "i1"),
        ("u2", "i2"),
    ] * 3
    assert len(entries) == 6


def test_blanks_around_cells_are_not_part_of_ids(tmp_path: Path) -> None:
    text = "user_id, item_id, timestamp\nu1, i1 , 5\n u1,\ti1,5\n"
    assert _read(tmp_path, text) == [Event("u1", "i1", "rate", 5000)] * 2


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_quotes_are_understood_with_every_separator(separator: str, tmp_path: Path) -> None:
    text = '"user";"item";"ts"\n"u 1";"0155;61";"1700000000"\n'.replace(";", separator)
    assert _read(tmp_path, text, LogLayout.parse(separator=separator)) == [
        Event("u 1", f"0155{separator}61", "rate", 1_700_000_000_000)
    ]


def test_quoted_commas_are_parsed(tmp_path: Path) -> None:
    assert _read(tmp_path, 'user,item,ts\n"a ""b"", c",i1,1e12\n') == [Event('a "b", c', "i1", "rate", 10**12)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("u1,i1,view", "3 columns; the first line has 5"),
        (",i1,view,5,1", "user_id"),
        ("u1,i1,view,yesterday,1", "timestamp 'yesterday' is not a number"),
        ("u1,i1,view,nan,1", "timestamp 'nan' is not a number"),
        ("u1,i1,view,inf,1", "timestamp 'inf' is not a number"),
        ("u1,i1,view,,1", "timestamp '' is not a number"),
        ("u1,i1,view,-5,1", "ts_ms`, got '-5000'"),
        ("u1,i1,view,1e300,1", "timestamp '1e300' counts nanoseconds by its size; the log's first are seconds"),
        ("u1,i1,view,5,good", "value`, got 'good'"),
        ("u1,i1,view,5,-1", "value"),
        ("u1,i1,view,5,inf", "value`, got 'inf'"),
        ("u1,i1,view,5,nan", "value`, got 'nan'"),
        ("u1," + "i" * 10_000 + ",view,5,1", "item_id"),
    ],
)
def test_invalid_line_is_a_bad_record_with_its_reason(line: str, reason: str, tmp_path: Path) -> None:
    good, bad = _read(tmp_path, f"user,item,action,ts,value\nu1,i1,view,5,1\n{line}\n")
    assert good == Event("u1", "i1", "view", 5000, value=1.0)
    assert isinstance(bad, BadRecord)
    assert (bad.line, bad.raw) == (3, line.encode())
    assert reason in bad.reason


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("one two three\n", None, "no tab, '::', comma or semicolon"),
        ("user,item,rating\n", None, "no header that names ts_ms"),
        ("196,242,3,881250949\n", None, "--columns user,item,ts"),
        ("user,item,ts\n", "user=user,item=thing,ts=ts", "has no column thing; its header names user, item, ts"),
        ("u1,i1,5\n", "user,item,value,ts", "names 4 columns; the first line has 3"),
    ],
)
def test_missing_columns_fail_at_once(text: str, columns: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(LogFileError, match=message):
        read_log(tmp_path / "log.csv", LogLayout.parse(columns))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "user,ts"}, "has no item_id"),
        ({"columns": "user,item,ts,user_id"}, "names user_id twice"),
        ({"columns": "user,item,ts,colour"}, "unknown field 'colour'"),
        ({"columns": "user=a,item,ts"}, "all by position"),
        ({"columns": "user=a,item=b,ts=c", "header": False}, "no header"),
        ({"columns": ""}, "has no user_id, item_id"),
        ({"header": False}, "--no-header: without a header the columns have no names"),
        ({"unit": "min"}, "want one of s, ms"),
        ({"format": "parquet"}, "want one of json, msgpack, text"),
        ({"separator": ""}, "separator is empty"),
    ],
)
def test_invalid_layout_is_rejected(options: dict, message: str) -> None:
    with pytest.raises(LogFileError, match=message):
        LogLayout.parse(**options)


def test_movielens_log_is_read_completely(movielens_path: Path, movielens_log: EventLog) -> None:
    log = movielens_log
    assert (len(log), log.unreadable, len(log.user_ids), len(log.item_ids)) == (100_000, 0, 943, 1682)
    assert (log.ts_ms[0], log.ts_ms[-1]) == (874_724_710_000, 893_286_638_000)
    events = list(read_log_by_time(movielens_path, run_entries=7000))
    assert [event.user_id for event in events if isinstance(event, Event)] == [log.user_ids[u] for u in log.users]
    assert [event.item_id for event in events if isinstance(event, Event)] == [log.item_ids[i] for i in log.items]
