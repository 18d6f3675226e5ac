"""A quoted cell may have line breaks; a quote that is not closed costs its own line alone."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.layout import BadRecord, LogEntry
from pipeline.data.log_io import LogLayout, read_log
from pipeline.records import Event

GOOD = "u,i,5"


def read(folder: Path, text: str, columns: str | None = "user,item,ts", **options: str) -> list[LogEntry]:
    path = folder / "log.csv"
    path.write_text(text)
    return list(read_log(path, LogLayout.parse(columns, **options)))


def users(entries: list[LogEntry]) -> list[str | int]:
    """Return each entry's user, or the line of a bad record."""
    return [entry.user_id if isinstance(entry, Event) else entry.line for entry in entries]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 18])
def test_line_breaks_inside_quotes_are_part_of_the_cell(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", chunk_bytes)
    text = 'user,item,ts,session\nu1,i1,5,s1\n"u\n7",i2,6,"a\r\n\n""b"""\nu2,i2,7,s3\nu3,i3,x,s4\n'
    entries = read(tmp_path, text, None)
    assert entries[:3] == [
        Event("u1", "i1", "rate", 5000, session_id="s1"),
        Event("u\n7", "i2", "rate", 6000, session_id='a\r\n\n"b"'),
        Event("u2", "i2", "rate", 7000, session_id="s3"),
    ]
    assert isinstance(entries[3], BadRecord)
    assert entries[3].line == 8, "a record's lines all count"


def test_records_over_many_blocks_are_yielded_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", 64)
    path = tmp_path / "log.csv"
    record = 'u,i,5,"one\ntwo\n' + "x" * 47 + '"\n'
    assert len(record) == 64, "each chunk ends within a record"
    path.write_text("user,item,ts,session\n" + record * 5000)
    entries = read_log(path)
    tracemalloc.start()
    try:
        assert sum(isinstance(entry, Event) for entry in entries) == 5000
        assert tracemalloc.get_traced_memory()[1] < 400_000  # the records of all blocks together take 2.5 MB
    finally:
        tracemalloc.stop()


def test_first_record_and_header_may_have_line_breaks(tmp_path: Path) -> None:
    assert users(read(tmp_path, f'"u\n1",i,5\n{GOOD}\n')) == ["u\n1", "u"]
    assert users(read(tmp_path, f'user,item,ts,"in\nEUR"\n{GOOD},1\n', None)) == ["u"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_unclosed_quote_costs_its_line_alone(separator: str, tmp_path: Path) -> None:
    lines = [GOOD, '"lone,i,5', *[GOOD] * 1000, '"u""1",i,5', '"other,i,5', 'u,i" x,5', 'u,"end"']
    entries = read(tmp_path, "\n".join(lines).replace(",", separator), separator=separator)
    assert users(entries) == ["u", 2, *["u"] * 1000, 'u"1', 1004, "u", 1006]
    bad = entries[1]
    assert isinstance(bad, BadRecord)
    assert bad.raw == lines[1].replace(",", separator).encode()
    assert bad.reason.startswith("a quoted cell is not closed in '\"lone")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("second", ['v,"j,6', 'v,"j"k,6', '"v"w,j,6'])
def test_two_quotes_that_are_not_closed_are_no_pair(second: str, separator: str, tmp_path: Path) -> None:
    lines = [GOOD, 'u,"i,5', second, GOOD]
    entries = read(tmp_path, "\n".join(lines).replace(",", separator), separator=separator)
    alone = read(tmp_path, f"{GOOD}\n{second}".replace(",", separator), separator=separator)[1]
    assert users(entries)[:2] == ["u", 2]
    assert users(entries)[2:] == [alone.user_id if isinstance(alone, Event) else 3, "u"]


@pytest.mark.parametrize(
    ("inside", "is_one_record"), [("\n" * 400, True), ("\n" * 600, False), (("x" * 999 + "\n") * 300, False)]
)
def test_quote_that_is_closed_beyond_the_limits_is_not_closed(inside: str, is_one_record: bool, tmp_path: Path) -> None:
    entries = read(tmp_path, f'{GOOD},s\nv,i,6,"{inside}"\n{GOOD},s\n', "user,item,ts,session")
    assert users(entries)[1] == ("v" if is_one_record else 2)
    assert users(entries)[-1] == "u"


@given(pieces=st.lists(st.sampled_from(['"', '""', "a", ",", "\n", " ", '","', "u,i,5\n"]), max_size=30))
def test_good_lines_around_any_text_are_read(pieces: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("log")
    text = "".join(pieces)
    entries = read(folder, f"first,i,5\n{text}\n" + "last,i,5\n" * 3)
    assert entries[0] == Event("first", "i", "rate", 5000)
    assert Event("last", "i", "rate", 5000) in entries[-2:]
