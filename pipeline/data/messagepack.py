"""MessagePack logs: a stream of maps, one after the other."""

from collections.abc import Iterator

import msgspec

from pipeline.data.layout import DECODE_ERRORS, BadRecord, InvalidLine, LogEntry
from pipeline.data.recorded_file import MAX_RECORD_BYTES, RecordedFile
from pipeline.records import Event

_decode = msgspec.msgpack.Decoder(Event).decode


def msgpack_blocks(file: RecordedFile) -> Iterator[list[LogEntry]]:
    """Yield blocks of entries. After an invalid byte the start of the next record cannot be found."""
    number = 1
    tail = b""
    chunks = file.chunks()
    while more := _take(chunks, len(tail)):
        tail += more
        entries, end, is_corrupt = _entries(tail, number)
        number += len(entries)
        tail = tail[end:]
        yield entries
        if is_corrupt or len(tail) > MAX_RECORD_BYTES:
            yield [BadRecord(number, tail, "not MessagePack from here on: the rest of the file cannot be read")]
            return
    if tail or file.broken:
        yield [BadRecord(number, tail, file.broken or "the file ends within this record")]


def _take(chunks: Iterator[bytes], size: int) -> bytes:
    """Return the next bytes, at least `size`: an unfinished record is scanned again when twice as much of it is there.

    Empty at the file's end.
    """
    pieces = []
    for chunk in chunks:
        pieces.append(chunk)
        size -= len(chunk)
        if size <= 0:
            break
    return b"".join(pieces)


def _entries(data: bytes, number: int) -> tuple[list[LogEntry], int, bool]:
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
        entries.append(_entry(data[start:end], number + len(entries)))
        start = end
    return entries, start, False


def _entry(raw: bytes, number: int) -> LogEntry:
    try:
        return _decode(raw)
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
