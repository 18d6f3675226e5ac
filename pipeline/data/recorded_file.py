"""Recorded files as bytes: gzipped or not, in chunks, in lines. Logs and item files are read through it.

A line ends at a line feed and nowhere else: U+2028, U+0085 and form feeds are part of its text. A byte order mark at
the start of a line is dropped, in the middle of the file too, where files were concatenated.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from pipeline.data.layout import BadRecord
from pipeline.errors import LogFileError

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24  # a greater length comes from a corrupt file, not from a record
KEPT_BYTES = 1 << 12  # of a line that is too long
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
READ_ERRORS = (OSError, EOFError, zlib.error)


@dataclass(slots=True)
class LineBlock:
    """Successive lines of a file. first: the number of the first one, from 1."""

    first: int
    lines: list[bytes]


@dataclass(slots=True)
class RecordedFile:
    """An open file. `broken` says, after the last chunk, why reading stopped before the file's end.

    start: its first bytes, at most a few KiB
    """

    file: BufferedReader | gzip.GzipFile
    start: bytes
    broken: str = ""

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes; close it at the end."""
        try:
            with self.file:
                while chunk := self.file.read1(CHUNK_BYTES):  # read() would lose the data before the error
                    yield chunk
        except READ_ERRORS as error:
            self.broken = f"the file ends early here: {error}"

    def lines(self) -> Iterator[LineBlock | BadRecord]:
        """Yield the lines in blocks. A line that is too long, or within which the file breaks off, is a bad record."""
        number = 1
        tail = _Tail()
        for chunk in self.chunks():
            first, *lines = chunk.split(b"\n")
            tail.add(first)
            if not lines:
                continue
            line = tail.take(number)
            tail.add(lines.pop())
            if isinstance(line, BadRecord):
                yield line
                number += 1
            else:
                lines.insert(0, line)
            yield LineBlock(number, [line.removeprefix(BOM) for line in lines] if BOM in chunk else lines)
            number += len(lines)
        if tail.size or self.broken:
            last = tail.take(number)
            if self.broken and isinstance(last, bytes):
                last = BadRecord(number, last, self.broken)
            yield last if isinstance(last, BadRecord) else LineBlock(number, [last])


@dataclass(slots=True)
class _Tail:
    """The line that has not ended yet, in the pieces that were read, up to MAX_RECORD_BYTES."""

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size <= MAX_RECORD_BYTES:
            self.pieces.append(piece)

    def take(self, number: int) -> bytes | BadRecord:
        """Return the line, or a bad record with its beginning when it is too long; start the next one."""
        line = b"".join(self.pieces).removeprefix(BOM)
        size = self.size
        self.pieces.clear()
        self.size = 0
        if size > MAX_RECORD_BYTES:
            return BadRecord(number, line[:KEPT_BYTES], f"a line of {size:,} bytes; want at most {MAX_RECORD_BYTES:,}")
        return line


def open_recorded(path: Path) -> RecordedFile:
    """Open a file, gzipped or not. LogFileError when it cannot be read, or is not UTF-8 but UTF-16."""
    try:
        file = _open(path)
        start = file.peek(4096)
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise LogFileError(f"{path}: cannot be read: {reason or error}") from error
    if _is_utf16(start):
        file.close()
        raise LogFileError(f"{path}: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}")
    return RecordedFile(file, start)


def _open(path: Path) -> BufferedReader | gzip.GzipFile:
    with path.open("rb") as file:
        start = file.read(2)
    if start == GZIP_MAGIC:
        return gzip.GzipFile(path)
    if path.suffix == ".gz" and start:
        raise LogFileError(f"{path}: is named .gz but is not gzipped; rename it, or download it again")
    return path.open("rb")


def _is_utf16(start: bytes) -> bool:
    """Whether the bytes begin with UTF-16's mark or, as Latin text without a mark does, have every second one zero."""
    return start.startswith(UTF16_MARKS) or (len(start) >= 4 and not (any(start[:64:2]) and any(start[1:64:2])))
