"""Bytes become lines at line feeds alone, once each and correctly numbered, in time that grows with the file."""

import contextlib
import gzip
import time
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.item_file import read_items
from pipeline.data.layout import BadRecord
from pipeline.data.log_io import read_log
from pipeline.data.recorded_file import BOM, LineBlock, RecordedFile, open_recorded
from pipeline.errors import LogFileError

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
    file = RecordedFile(cast(BufferedReader, Pieces(content, piece_bytes)), b"")
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True])
def test_utf16_is_refused_with_the_command_that_converts_it(encoding: str, packed: bool, tmp_path: Path) -> None:
    content = "user_id,item_id,ts,title\nu,i,1,x\n".encode(encoding)
    path = tmp_path / "log.csv"
    path.write_bytes(gzip.compress(content) if packed else content)
    for read in (read_log, read_items):
        with pytest.raises(LogFileError, match=r"log\.csv: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 log\.csv"):
            read(path)
