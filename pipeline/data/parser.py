"""Parse the lines of logs and item files into entries, block by block: every record once, read or as a bad record.

A blank line is not a record. A file that ends early (a truncated gzip stream, a failing disk) ends with a bad record
that says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec

from pipeline.data.delimited import DelimitedReader
from pipeline.data.layout import DECODE_ERRORS, BadRecord, InvalidLine, LogEntry, LogLayout, RepeatedHeader
from pipeline.data.recorded_file import LineBlock, RecordedFile
from pipeline.data.text_records import text_records
from pipeline.records import Event

Record = TypeVar("Record")

_BYTE_POSITION = re.compile(r"\(byte (\d+)\)$")
_event_from_json = msgspec.json.Decoder(Event).decode


def json_blocks(file: RecordedFile) -> Iterator[list[LogEntry]]:
    """Yield blocks of entries from JSON lines."""
    return parsed(file.lines(), _event_from_json, "an event")


def text_blocks(file: RecordedFile, layout: LogLayout, name: str) -> tuple[Iterator[list[LogEntry]], tuple[str, ...]]:
    """Return the blocks' iterator, and what was recognised. LogFileError when the first line lacks a column."""
    records = text_records(file.lines(), layout.separator, name)
    if not records.first:  # only blank lines, or the file ended early
        return parsed(records.blocks(0, skip_first=False), _event_from_json, "an event"), ()
    reader = DelimitedReader.from_records(layout, records, name)
    entries = parsed(records.blocks(reader.width, reader.header is not None), reader.event, "an event")
    return (entries if reader.ts_column is not None else _with_positions_as_times(entries)), reader.notes


def parsed(
    blocks: Iterable[LineBlock | BadRecord], parse: Callable[[bytes], Record], kind: str
) -> Iterator[list[Record | BadRecord]]:
    """Yield the blocks' entries. kind: what `parse` returns, for its messages: "an event"."""
    for block in blocks:
        if isinstance(block, BadRecord):
            yield [block]
            continue
        try:
            yield list(map(parse, block.lines))
        except (*DECODE_ERRORS, InvalidLine):
            yield list(_parsed_one_by_one(block, parse, kind))


def _parsed_one_by_one(block: LineBlock, parse: Callable[[bytes], Record], kind: str) -> Iterator[Record | BadRecord]:
    """Parse a block in which a line is bad, blank or a repeated header."""
    number = block.first
    for line in block.lines:
        try:
            if line.strip():
                yield parse(line)
        except RepeatedHeader:
            pass
        except InvalidLine as error:
            yield BadRecord(number, line, str(error))
        except DECODE_ERRORS as error:
            yield BadRecord(number, line, _decode_error(line, error, kind))
        number += 1 + line.count(b"\n")


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


def _decode_error(line: bytes, error: Exception, kind: str) -> str:
    """Return the decoder's message with the text at the byte position that it gives."""
    position = _BYTE_POSITION.search(str(error))
    text = line[int(position[1]) :].rstrip()[:20].decode("utf-8", "replace") if position else ""
    return f"not {kind}: {error}" + (f", at '{text}'" if text else "")
