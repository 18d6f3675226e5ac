"""Parse a log's bytes into entries, block by block: every record once, as an event or as a bad record.

A blank line is not a record. A file that ends early (a truncated gzip stream, a failing disk) ends with a bad record
that says so.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain

import msgspec

from pipeline.data.delimited import DelimitedReader
from pipeline.data.layout import BadRecord, InvalidLine, LogEntry, LogLayout
from pipeline.records import Event

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24  # of MessagePack: a greater length comes from a corrupt stream, not from a record
BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error)
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_BYTE_POSITION = re.compile(r"\(byte (\d+)\)$")
_from_json = msgspec.json.Decoder(Event).decode
_from_msgpack = msgspec.msgpack.Decoder(Event).decode


@dataclass(slots=True)
class ChunkedFile:
    """A file in chunks. `broken` says, after the last one, why reading stopped before the file's end."""

    file: BufferedReader | gzip.GzipFile
    broken: str = ""

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes; close it at the end."""
        try:
            with self.file:
                while chunk := self.file.read1(CHUNK_BYTES):  # read() would lose the data before the error
                    yield chunk
        except READ_ERRORS as error:
            self.broken = f"the file ends early here: {error}"

    def lines(self) -> Iterator[list[bytes] | BadRecord]:
        """Yield blocks of lines; when the file ends early, the rest of its last line as a bad record."""
        number = 1
        tail = b""
        for chunk in self.chunks():
            *lines, tail = (tail + chunk).split(b"\n")
            number += len(lines)
            yield lines
        if self.broken:
            yield BadRecord(number, tail, self.broken)
        elif tail:
            yield [tail]


def json_blocks(file: ChunkedFile) -> Iterator[list[LogEntry]]:
    """Yield blocks of entries from JSON lines."""
    return _line_blocks(file.lines(), _from_json)


def text_blocks(file: ChunkedFile, layout: LogLayout, name: str) -> Iterator[list[LogEntry]]:
    """Return the blocks' iterator. LogFileError when the first line does not have the columns."""
    blocks = file.lines()
    head: list[list[bytes] | BadRecord] = []
    for block in blocks:
        head.append(block)
        first = next((line for line in block if line.strip()), None) if isinstance(block, list) else None
        if first is not None:
            text = first.removeprefix(BOM).rstrip(b"\r").decode("utf-8", "replace")
            reader = DelimitedReader.from_first_line(layout, text, name)
            entries = _line_blocks(chain(head, blocks), reader.event, reader.has_header)
            return entries if reader.ts_column is not None else _with_positions_as_times(entries)
    return _line_blocks(head, _from_json)  # only blank lines, or the file ended early


def _line_blocks(
    blocks: Iterable[list[bytes] | BadRecord], parse: Callable[[bytes], Event], has_header: bool = False
) -> Iterator[list[LogEntry]]:
    number = 1
    skip = has_header
    for block in blocks:
        if isinstance(block, BadRecord):
            yield [block]
            continue
        if number == 1 and block:
            block[0] = block[0].removeprefix(BOM)
        entries, skip = _line_entries(block, number, parse, skip)
        number += len(block)
        yield entries


def _with_positions_as_times(blocks: Iterable[list[LogEntry]]) -> Iterator[list[LogEntry]]:
    """Set each event's time to its position in the log, in milliseconds from 0."""
    position = 0
    for block in blocks:
        positions = range(position, position + len(block))
        position += len(block)
        yield [
            msgspec.structs.replace(entry, ts_ms=ts_ms) if isinstance(entry, Event) else entry
            for ts_ms, entry in zip(positions, block, strict=True)
        ]


def _line_entries(
    lines: list[bytes], first_number: int, parse: Callable[[bytes], Event], skip: bool
) -> tuple[list[LogEntry], bool]:
    """Parse a block of good lines at once, else line by line: one is bad, blank, or the header (`skip`).

    Returns the entries and whether the header is still to be skipped.
    """
    try:
        if not skip:
            return list(map(parse, lines)), False
    except (*DECODE_ERRORS, InvalidLine):
        pass
    entries: list[LogEntry] = []
    for number, line in enumerate(lines, first_number):
        if not line.strip():
            continue
        if skip:
            skip = False
            continue
        try:
            entries.append(parse(line))
        except InvalidLine as error:
            entries.append(BadRecord(number, line, str(error)))
        except DECODE_ERRORS as error:
            entries.append(BadRecord(number, line, _decode_error(line, error)))
    return entries, skip


def _decode_error(line: bytes, error: Exception) -> str:
    """Return the decoder's message with the text at the byte position that it gives."""
    position = _BYTE_POSITION.search(str(error))
    text = line[int(position[1]) :].rstrip()[:20].decode("utf-8", "replace") if position else ""
    return f"not an event: {error}" + (f", at '{text}'" if text else "")


def msgpack_blocks(file: ChunkedFile) -> Iterator[list[LogEntry]]:
    """Yield entries from a stream of maps. After an invalid byte the start of the next record cannot be found."""
    number = 1
    tail = b""
    for chunk in file.chunks():
        tail += chunk
        entries, end, is_corrupt = _msgpack_entries(tail, number)
        number += len(entries)
        tail = tail[end:]
        yield entries
        if is_corrupt or len(tail) > MAX_RECORD_BYTES:
            yield [BadRecord(number, tail, "not MessagePack from here on: the rest of the file cannot be read")]
            return
    if tail or file.broken:
        yield [BadRecord(number, tail, file.broken or "the file ends within this record")]


def _msgpack_entries(data: bytes, number: int) -> tuple[list[LogEntry], int, bool]:
    """Return the complete records in `data`, where they end, and whether an invalid byte follows them."""
    entries: list[LogEntry] = []
    start = 0
    while start < len(data):
        try:
            end = record_end(data, start)
        except InvalidLine:
            return entries, start, True
        if end is None:
            break
        entries.append(_msgpack_entry(data[start:end], number + len(entries)))
        start = end
    return entries, start, False


def _msgpack_entry(raw: bytes, number: int) -> LogEntry:
    try:
        return _from_msgpack(raw)
    except DECODE_ERRORS as error:
        return BadRecord(number, raw, f"not an event: {error}")


def _fixed_sizes() -> list[int]:
    """Return a value's size in bytes by its first byte, without its children; 0: a length follows; -1: invalid."""
    sizes = [1] * 0xA0 + [1 + n for n in range(32)] + [1, -1, 1, 1] + [0] * 6  # fixint, fixmap, fixarray; fixstr; c0-c9
    sizes += [5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18] + [0] * 7 + [1] * 32  # ca-d8; d9-df; negative fixint
    return sizes


_SIZES = _fixed_sizes()
_CHILDREN = [0] * 0x80 + [2 * n for n in range(16)] + list(range(16)) + [0] * 0x60
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LENGTH_BYTES |= {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def record_end(data: bytes, start: int) -> int | None:
    """Return where the MessagePack value at `start` ends (the format's specification, table of first bytes).

    None: beyond `data`. InvalidLine: a byte that cannot start a value.
    """
    end = start
    pending = 1
    limit = len(data)
    while pending:
        if end >= limit:
            return None
        first = data[end]
        size = _SIZES[first]
        if size > 0:
            end += size
            pending += _CHILDREN[first] - 1
        elif size == 0:
            width = _LENGTH_BYTES[first]
            length = int.from_bytes(data[end + 1 : end + 1 + width])
            end += 1 + width
            if first >= 0xDC:  # array and map: children, no bytes of its own
                pending += (length << (first >= 0xDE)) - 1
            else:
                end += length + (0xC7 <= first <= 0xC9)  # an extension has a type byte
                pending -= 1
        else:
            raise InvalidLine(f"byte {end} cannot start a MessagePack value")
    return end if end <= limit else None
