"""Bytes of a log become entries, a block at a time: every record once, as an event or as a bad record.

A blank line is no record. A file that breaks off (a cut gzip stream, a failing disk) ends with a bad record that says
so.
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
from pipeline.data.layout import BadRecord, InvalidLine, LogEntry, LogLayout, check_value
from pipeline.records import Event

CHUNK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24  # of MessagePack: a length beyond this is a torn stream's, not a record's
BOM = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error)
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_NAMED_BYTE = re.compile(r"\(byte (\d+)\)$")
_from_json = msgspec.json.Decoder(Event).decode
_from_msgpack = msgspec.msgpack.Decoder(Event).decode


@dataclass(slots=True)
class Stream:
    """A file in chunks. `broken` says, after the last one, why it ended before its end."""

    file: BufferedReader | gzip.GzipFile
    broken: str = ""

    def chunks(self) -> Iterator[bytes]:
        try:
            with self.file:
                while chunk := self.file.read1(CHUNK_BYTES):  # read() would lose what lies before the break
                    yield chunk
        except READ_ERRORS as error:
            self.broken = f"the file breaks off here: {error}"

    def lines(self) -> Iterator[list[bytes] | BadRecord]:
        """Blocks of lines, and at a break what is left of the last one."""
        number, tail = 1, b""
        for chunk in self.chunks():
            *lines, tail = (tail + chunk).split(b"\n")
            number += len(lines)
            yield lines
        if self.broken:
            yield BadRecord(number, tail, self.broken)
        elif tail:
            yield [tail]


def json_blocks(stream: Stream) -> Iterator[list[LogEntry]]:
    return _line_blocks(stream.lines(), _from_json)


def text_blocks(stream: Stream, layout: LogLayout, name: str) -> Iterator[list[LogEntry]]:
    """LogFileError when the first line does not have the columns."""
    blocks = stream.lines()
    head: list[list[bytes] | BadRecord] = []
    for block in blocks:
        head.append(block)
        first = next((line for line in block if line.strip()), None) if isinstance(block, list) else None
        if first is not None:
            table = DelimitedReader.from_first_line(
                layout, first.removeprefix(BOM).rstrip(b"\r").decode("utf-8", "replace"), name
            )
            entries = _line_blocks(chain(head, blocks), table.event, table.has_header)
            return entries if table.ts_column is not None else _numbered(entries)
    return _line_blocks(head, _from_json)  # blank lines, or a break


def _line_blocks(
    blocks: Iterable[list[bytes] | BadRecord], event: Callable[[bytes], Event], header: bool = False
) -> Iterator[list[LogEntry]]:
    number, skip = 1, header
    for block in blocks:
        if isinstance(block, BadRecord):
            yield [block]
            continue
        if number == 1 and block:
            block[0] = block[0].removeprefix(BOM)
        entries, skip = _line_entries(block, number, event, skip)
        number += len(block)
        yield entries


def _numbered(blocks: Iterable[list[LogEntry]]) -> Iterator[list[LogEntry]]:
    """The place in the log becomes the time, in milliseconds from 0."""
    now_ms = 0
    for block in blocks:
        places = range(now_ms, now_ms + len(block))
        now_ms += len(block)
        yield [
            msgspec.structs.replace(entry, ts_ms=place) if isinstance(entry, Event) else entry
            for place, entry in zip(places, block, strict=True)
        ]


def _line_entries(
    lines: list[bytes], number: int, event: Callable[[bytes], Event], skip: bool
) -> tuple[list[LogEntry], bool]:
    """Whole blocks of good lines at once; line by line where one is bad, blank, or the header (`skip`)."""
    try:
        if not skip:
            return list(map(event, lines)), False
    except (*DECODE_ERRORS, InvalidLine):
        pass
    entries: list[LogEntry] = []
    for place, line in enumerate(lines, number):
        if not line.strip():
            continue
        if skip:
            skip = False
            continue
        try:
            entries.append(event(line))
        except InvalidLine as error:
            entries.append(BadRecord(place, line, str(error)))
        except DECODE_ERRORS as error:
            entries.append(BadRecord(place, line, _why_no_event(line, error)))
    return entries, skip


def _why_no_event(line: bytes, error: Exception) -> str:
    """The decoder's words, and what stands at the byte that they name."""
    named = _NAMED_BYTE.search(str(error))
    there = line[int(named[1]) :].rstrip()[:20].decode("utf-8", "replace") if named else ""
    return f"not an event: {error}" + (f", at '{there}'" if there else "")


def msgpack_blocks(stream: Stream) -> Iterator[list[LogEntry]]:
    """A stream of maps. After a byte that no MessagePack has there is no telling where the next record starts."""
    number, tail = 1, b""
    for chunk in stream.chunks():
        tail += chunk
        entries, end, torn = _msgpack_entries(tail, number)
        number, tail = number + len(entries), tail[end:]
        yield entries
        if torn or len(tail) > MAX_RECORD_BYTES:
            yield [BadRecord(number, tail, "no MessagePack from here on: the rest of the file cannot be read")]
            return
    if tail or stream.broken:
        yield [BadRecord(number, tail, stream.broken or "the file ends within this record")]


def _msgpack_entries(data: bytes, number: int) -> tuple[list[LogEntry], int, bool]:
    """The whole records in `data`, where they end, and whether no record can follow."""
    entries: list[LogEntry] = []
    start, torn = 0, False
    while start < len(data):
        try:
            end = record_end(data, start)
        except InvalidLine:
            torn = True
            break
        if end is None:
            break
        entries.append(_msgpack_entry(data[start:end], number + len(entries)))
        start = end
    return entries, start, torn


def _msgpack_entry(raw: bytes, number: int) -> LogEntry:
    try:
        return check_value(_from_msgpack(raw))
    except InvalidLine as error:
        return BadRecord(number, raw, str(error))
    except DECODE_ERRORS as error:
        return BadRecord(number, raw, f"not an event: {error}")


def _fixed_sizes() -> list[int]:
    """Bytes of a value by its first one, without its children; 0: a length follows; -1: no MessagePack."""
    sizes = [1] * 0xA0 + [1 + n for n in range(32)] + [1, -1, 1, 1] + [0] * 6  # fixint, fixmap, fixarray; fixstr; c0-c9
    sizes += [5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18] + [0] * 7 + [1] * 32  # ca-d8; d9-df; negative fixint
    return sizes


_SIZES = _fixed_sizes()
_CHILDREN = [0] * 0x80 + [2 * n for n in range(16)] + list(range(16)) + [0] * 0x60
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LENGTH_BYTES |= {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def record_end(data: bytes, at: int) -> int | None:
    """Where the MessagePack value that starts at `at` ends (the format's specification, table of first bytes).

    None: beyond `data`. Unreadable: a byte that starts no value.
    """
    pending, limit = 1, len(data)
    while pending:
        if at >= limit:
            return None
        first = data[at]
        size = _SIZES[first]
        if size > 0:
            at += size
            pending += _CHILDREN[first] - 1
        elif size == 0:
            width = _LENGTH_BYTES[first]
            length = int.from_bytes(data[at + 1 : at + 1 + width])
            at += 1 + width
            if first >= 0xDC:  # array and map: children, no bytes of its own
                pending += (length << (first >= 0xDE)) - 1
            else:
                at += length + (0xC7 <= first <= 0xC9)  # an extension has a type byte
                pending -= 1
        else:
            raise InvalidLine(f"byte {at} is no MessagePack")
    return at if at <= limit else None
