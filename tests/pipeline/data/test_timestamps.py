"""Times are read in the one unit that a log's numbers count, or as dates; what does not fit is said."""

from pathlib import Path

import pytest

from pipeline.data.layout import BadRecord, InvalidLine
from pipeline.data.log_io import LogLayout, read_log, recognised
from pipeline.data.timestamps import recognise
from pipeline.records import Event

MS = 1_569_888_000_123


@pytest.mark.parametrize(
    ("text", "ts_ms", "note"),
    [
        ("1569888000", MS - 123, "seconds since 1970 (UTC)"),
        ("1569888000.123", MS, "seconds since 1970 (UTC)"),
        ("1569888000123", MS, "milliseconds since 1970 (UTC)"),
        ("1.569888000123e12", MS, "milliseconds since 1970 (UTC)"),
        ("1569888000123456", MS, "microseconds since 1970 (UTC)"),
        ("1569888000123456789", MS, "nanoseconds since 1970 (UTC)"),
        ("2019-10-01 00:00:00 UTC", MS - 123, "ISO 8601 dates, in UTC where they name no zone"),
        ("2019-10-01T00:00:00.123Z", MS, "ISO 8601 dates"),
        ("2019-10-01 02:00:00.123999+02:00", MS, "ISO 8601 dates"),
        ("2019-10-01 00:00:00.123", MS, "ISO 8601 dates, in UTC where they name no zone"),
        ("2019-10-01", MS - 123, "ISO 8601 dates, in UTC where they name no zone"),
        ("20191001", MS - 123, "ISO 8601 dates, in UTC where they name no zone"),
        ("20191301", 20_191_301_000, "seconds since 1970 (UTC)"),
    ],
)
def test_numbers_of_every_unit_and_dates_are_recognised(text: str, ts_ms: int, note: str, tmp_path: Path) -> None:
    reader, said = recognise([text], None)
    assert (reader.read(text), said) == (ts_ms, f"timestamps are read as {note}")
    (tmp_path / "log.csv").write_text(f"user_id,event_time,product_id\nu,{text},p\n")
    assert list(read_log(tmp_path / "log.csv")) == [Event("u", "p", "rate", ts_ms)]
    assert recognised(tmp_path / "log.csv") == (said,)


@pytest.mark.parametrize(("unit", "ts_ms"), [("s", 5_000_000), ("ms", 5000), ("us", 5), ("ns", 0)])
def test_given_unit_reads_numbers_of_any_size(unit: str, ts_ms: int, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,i,5000\nu,i,0\n")
    layout = LogLayout.parse("user,item,ts", unit=unit)
    assert list(read_log(tmp_path / "log.csv", layout)) == [Event("u", "i", "rate", ts_ms), Event("u", "i", "rate", 0)]
    assert recognised(tmp_path / "log.csv", layout) == ()


def test_number_of_another_unit_than_the_logs_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("u,i,1700000000\nu,i,0\nu,i,1700000000000\nu,i,2023-11-14T22:13:20Z\n")
    first, second, bad, date = read_log(tmp_path / "log.csv", LogLayout.parse("user,item,ts"))
    assert first == date == Event("u", "i", "rate", 1_700_000_000_000)
    assert second == Event("u", "i", "rate", 0)
    assert isinstance(bad, BadRecord)
    assert bad.reason == (
        "timestamp '1700000000000' counts milliseconds by its size; the log's first are seconds; give --unit"
    )


def test_unit_is_that_of_most_of_the_first_times() -> None:
    reader, said = recognise(["0", "1700000000000", "nonsense", "1700000000001"], None)
    assert (reader.unit, said) == ("ms", "timestamps are read as milliseconds since 1970 (UTC)")
    with pytest.raises(InvalidLine, match="counts seconds by its size; the log's first are milliseconds"):
        reader.read("0")
    reader, _ = recognise(["2019-10-01"], None)
    with pytest.raises(InvalidLine, match="counts seconds by its size; the log's first are dates"):
        reader.read("5")


@pytest.mark.parametrize("text", ["", "nan", "-inf", "yesterday", "2019-13-01", "1e400", "9" * 5000])
@pytest.mark.parametrize("unit", [None, "s", "ns"])
def test_text_that_is_no_time_is_said(text: str, unit: str | None) -> None:
    reader, _ = recognise(["5"], unit)
    with pytest.raises(InvalidLine, match="is not a number of seconds or smaller units, nor an ISO 8601 date"):
        reader.read(text)


def read(folder: Path, text: str, columns: str | None = None) -> list[int]:
    """Return the events' times, and the negative line numbers of bad records."""
    (folder / "log.csv").write_text(text)
    entries = read_log(folder / "log.csv", LogLayout.parse(columns))
    return [entry.ts_ms if isinstance(entry, Event) else -entry.line for entry in entries]


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 18])
@pytest.mark.parametrize(
    "bad",
    [
        'u,"i,1700000000',  # a quote that may still be closed when the first lines end
        "x" * 5000,  # longer than a record may be
        'u,"i,1700000000\n' + "y" * 5000,
        "u,i,",
        "u,i",
        'u,"i"\nu,i,\nu,"i',
    ],
)
def test_bad_lines_at_the_beginning_of_a_log_do_not_decide_its_unit(
    bad: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", chunk_bytes)
    good = "".join(f"u,i,{1_700_000_000 + second}\n" for second in range(300))
    count = bad.count("\n") + 1
    expected = [-line for line in range(2, 2 + count)] + [1_700_000_000_000 + 1000 * second for second in range(300)]
    assert read(tmp_path, f"user_id,item_id,timestamp\n{bad}\n{good}") == expected
    assert recognised(tmp_path / "log.csv") == ("timestamps are read as seconds since 1970 (UTC)",)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1700000000", "1700000001.5", "1700000000000"], [1_700_000_000_000, 1_700_000_001_500, -1103]),
        (["1700000000000", "0"], [1_700_000_000_000, -1102]),
        (["2019-10-01", "1569888000", "2019-10-01"], [MS - 123] * 3),
        (["20191001", "2019-10-01"], [MS - 123] * 2),
    ],
)
def test_first_number_decides_where_the_first_thousand_lines_have_no_time(
    times: list[str], expected: list[int], tmp_path: Path
) -> None:
    text = "user_id,item_id,timestamp\n" + "u,i,\n" * 1099 + "".join(f"u,i,{time}\n" for time in times)
    assert read(tmp_path, text)[1099:] == expected
    assert recognised(tmp_path / "log.csv") == (
        "none of its first 1,000 records has a time: the first number decides the unit",
    )


def test_eight_digits_are_a_date_among_dates_and_seconds_among_numbers(tmp_path: Path) -> None:
    dates = "u,i,2019-10-01\n" * 3
    assert read(tmp_path, f"{dates}u,i,20191001\n", "user,item,ts") == [MS - 123] * 4
    assert read(tmp_path, "u,i,20191001\nu,i,20191001\n", "user,item,ts") == [MS - 123] * 2
    assert read(tmp_path, dates * 400 + "u,i,20191001\nu,i,20191301\n", "user,item,ts")[1200:] == [MS - 123, -1202]
    numbers = [0, 20_191_001, 20_191_301, 20_200_000]
    text = "".join(f"u,i,{number}\n" for number in numbers)
    assert read(tmp_path, text, "user,item,ts") == [number * 1000 for number in numbers]
