"""Recorded files as bytes: gzipped or not, in chunks, in lines. Logs and item files are read through it.

A line ends at a line feed and nowhere else: U+2028, U+0085 and form feeds are part of its text. A byte order mark at
the start of a line is dropped, in the middle of the file too, where files were concatenated.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from shlex import quote

from pipeline.data.layout import BadRecord
from pipeline.errors import LogFileError

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24  # a greater length comes from a corrupt file, not from a record
KEPT_BYTES = 1 << 12  # of a line that is too long
GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
MARKS = {  # UTF-32's first: UTF-16's begins it
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
WIDE_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
ASCII_TEXT = frozenset("\t\r\n" + "".join(map(chr, range(32, 127))))
READ_ERRORS = (OSError, EOFError, zlib.error)


@dataclass(slots=True)
class LineBlock:
    """Successive lines of a file. first: the number of the first one, from 1."""

    first: int
    lines: list[bytes]


@dataclass(slots=True)
class RecordedFile:
    """An open file. `broken` says, after the last chunk, why reading stopped before the file's end.

    start: its first bytes, at most a few KiB; path: for messages
    """

    file: BufferedReader | gzip.GzipFile
    start: bytes
    path: Path
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
        """Return the lines in blocks. A line that is too long, or within which the file breaks off, is a bad record.

        LogFileError, at once, when they end with carriage returns alone.
        """
        if b"\r" in self.start.rstrip(b"\r") and b"\n" not in self.start:
            self.file.close()
            command = _conversion(self.file, self.path, r"tr '\r' '\n'", "lf")
            raise LogFileError(f"{self.path}: its lines end with carriage returns alone; convert them: {command}")
        return self._lines()

    def _lines(self) -> Iterator[LineBlock | BadRecord]:
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
    """Open a file, gzipped or not. LogFileError when it cannot be read, or is not UTF-8 but UTF-16 or UTF-32."""
    try:
        file = _open(path)
        start = file.peek(4096)
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise LogFileError(f"{path}: cannot be read: {reason or error}") from error
    if encoding := _wide_encoding(start):
        file.close()
        command = _conversion(file, path, f"iconv -f {encoding} -t UTF-8", "utf8")
        raise LogFileError(f"{path}: is {encoding}; convert it: {command}")
    return RecordedFile(file, start, path)


def _open(path: Path) -> BufferedReader | gzip.GzipFile:
    with path.open("rb") as file:
        start = file.read(2)
    if start == GZIP_MAGIC:
        return gzip.GzipFile(path)
    if path.suffix == ".gz" and start:
        raise LogFileError(f"{path}: is named .gz but is not gzipped; rename it, or download it again")
    return path.open("rb")


def _conversion(file: BufferedReader | gzip.GzipFile, path: Path, program: str, prefix: str) -> str:
    """Return the shell's command that writes the file, converted by a program, beside it."""
    name = quote(path.name)
    target = quote(f"{prefix}-{path.name.removesuffix('.gz')}")
    if isinstance(file, gzip.GzipFile):
        return f"gzip -dc < {name} | {program} > {target}"
    return f"{program} < {name} > {target}"


def _wide_encoding(start: bytes) -> str | None:
    """Return the encoding, as iconv calls it, of a file of UTF-16 or UTF-32, with a mark or without; None of others."""
    marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)
    return marked or next((encoding for encoding in WIDE_ENCODINGS if _is_text_of(start, encoding)), None)


def _is_text_of(start: bytes, encoding: str) -> bool:
    """Whether an eighth of the characters are ASCII, as separators and digits are, in this wide encoding, and none NUL.

    In a wide encoding ASCII has zero bytes, which UTF-8 does not have at all, and MessagePack in runs: NUL.
    """
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(start)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return len(text) > 1 and "\0" not in text and 8 * sum(map(ASCII_TEXT.__contains__, text)) >= len(text)
