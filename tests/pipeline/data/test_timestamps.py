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
