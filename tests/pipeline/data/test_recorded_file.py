"""Bytes become lines at line feeds alone, once each and correctly numbered, in time that grows with the file."""

import contextlib
import gzip
import subprocess
import time
from io import BufferedReader, BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.item_file import read_items
from pipeline.data.layout import BadRecord
from pipeline.data.log_io import read_log, write_log
from pipeline.data.recorded_file import BOM, LineBlock, RecordedFile, open_recorded
from pipeline.errors import LogFileError
from pipeline.records import MAX_TS_MS, Event

EVENT = b'{"user_id":"u","item_id":"i","action":"view","ts_ms":1}'
lines_of_text = st.lists(st.text("ab\u2028\u0085\f\r\x1c\ufeff", max_size=4).map("x{}".format), max_size=12)


class Pieces(BytesIO):
    """A file that gives so many bytes at a time."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self._size = size

    def read1(self, size: int | None = -1, /) -> bytes:
        return self.read(self._size)


def numbered_lines(file: RecordedFile) -> list[tuple[int, bytes]]:
    lines = []
    for block in file.lines():
        lines += enumerate(block.lines, block.first) if isinstance(block, LineBlock) else [(block.line, block.raw)]
    return lines


@given(lines_of_text, st.integers(1, 30), st.booleans(), st.booleans())
def test_lines_end_at_line_feeds_alone_however_they_are_read(
    texts: list[str], piece_bytes: int, has_mark: bool, ends: bool
) -> None:
    lines = [text.encode() for text in texts]
    content = b"\n".join((BOM if has_mark else b"") + line for line in lines) + (b"\n" if ends and lines else b"")
    file = RecordedFile(cast(BufferedReader, Pieces(content, piece_bytes)), b"", Path("log"))
    assert numbered_lines(file) == list(enumerate(lines, 1))


def test_all_members_of_a_gzip_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\nthr") + gzip.compress(b"ee"))
    assert numbered_lines(open_recorded(path)) == [(1, b"one"), (2, b"two"), (3, b"three")]


def test_line_that_is_too_long_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", 300)
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join([EVENT, b"x" * 5000, EVENT, EVENT, b"y" * 1001]))
    first, long, second, third, last = read_log(path)
    assert first == second == third
    assert isinstance(long, BadRecord)
    assert isinstance(last, BadRecord)
    assert (long.line, long.reason) == (2, "a line of 5,000 bytes; want at most 1,000")
    assert (last.line, last.reason) == (5, "a line of 1,001 bytes; want at most 1,000")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", b'{"user_id":"' + b"7" * (1 << 20)),
        ("log.csv", b"user,item,ts\n" + b"7" * (1 << 20)),
        ("items.csv", b"item_id,title\n" + b"7" * (1 << 20)),
        ("log.msgpack", b"\xdd\x7f\xff\xff\xff" + b"\x01" * (1 << 17)),
    ],
)
def test_record_that_goes_on_to_the_end_of_the_file_takes_linear_time(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.recorded_file.CHUNK_BYTES", 64)
    path = tmp_path / name
    path.write_bytes(content)
    start_s = time.process_time()
    with contextlib.suppress(LogFileError):
        entries = list(read_log(path)) if name.startswith("log") else read_items(path)
        assert entries
    assert time.process_time() - start_s < 2  # 0.1 s; joined or scanned again with every chunk: 6 s and more


LATIN = "user_id,item_id,ts_ms,title\nu,i,1,x\n"
CYRILLIC = "user_id,товар,время\nпользователь,лампа настольная,1700000000\n"
WIDE_CODECS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("text", [LATIN, CYRILLIC, CYRILLIC * 500])
@pytest.mark.parametrize("codec", WIDE_CODECS)
@pytest.mark.parametrize("packed", [False, True])
def test_wide_encoding_is_refused_with_the_command_that_converts_it(
    text: str, codec: str, packed: bool, tmp_path: Path
) -> None:
    assert converted(tmp_path / "my log.csv", text.encode(codec), packed, f"is UTF-{codec[4:6]}") == text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("text", [LATIN, CYRILLIC, LATIN.removesuffix("\n")])
def test_carriage_returns_alone_are_refused_with_the_command_that_converts_them(
    text: str, packed: bool, tmp_path: Path
) -> None:
    content = text.replace("\n", "\r").encode()
    assert converted(tmp_path / "my log.csv", content, packed, "its lines end with carriage returns alone") == text


def converted(path: Path, content: bytes, packed: bool, message: str) -> str:
    """Return the file's text as the command that its refusal names converts it."""
    path.write_bytes(gzip.compress(content) if packed else content)
    for read in (read_log, read_items):
        with pytest.raises(LogFileError, match=message) as refusal:
            read(path)
    command, _, target = str(refusal.value).partition("convert ")[2].partition(": ")[2].rpartition(" > ")
    subprocess.run(["bash", "-c", f"{command} > {target}"], cwd=path.parent, check=True)
    return (path.parent / target.strip("'")).read_text(encoding="utf-8-sig")


@given(
    st.lists(
        st.builds(Event, st.text("aя\ufeff", min_size=1), st.just("i"), st.just("view"), st.integers(0, MAX_TS_MS))
    )
)
def test_logs_of_integers_and_any_letters_are_not_taken_for_a_wide_encoding(log: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        for name in ("log.msgpack", "log.jsonl", "log.tsv"):
            write_log(Path(folder) / name, log)
            assert list(read_log(Path(folder) / name)) == log
