"""Read, sort and write recorded logs of events: JSON lines, MessagePack or delimited text, gzipped or not.

A record that cannot be read is yielded as a `BadRecord` at its position: it is neither raised nor silently dropped.
A file that cannot be read at all is a LogFileError with one sentence.
"""

import gzip
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import IO

import msgspec

from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.external_sort import RUN_ENTRIES, sorted_by_time
from pipeline.data.layout import BadRecord, LogEntry, LogLayout, detect_format
from pipeline.data.parser import READ_ERRORS, ChunkedFile, json_blocks, msgpack_blocks, text_blocks
from pipeline.errors import LogFileError
from pipeline.records import Event, EventSchema

__all__ = [
    "BadRecord",
    "EventLog",
    "LogEntry",
    "LogLayout",
    "read_event_log",
    "read_log",
    "read_log_by_time",
    "write_log",
]

GZIP_MAGIC = b"\x1f\x8b"
WRITE_EVENTS = 1000
DEFAULT_SCHEMA = EventSchema()
TEXT_FIELDS = tuple(field.name for field in msgspec.structs.fields(Event))

_to_json = msgspec.json.Encoder()
_to_msgpack = msgspec.msgpack.Encoder()


def read_log(path: str | Path, layout: LogLayout | None = None) -> Iterator[LogEntry]:
    """Yield every record in the file's order. LogFileError, at once, when the file cannot be read at all."""
    return chain.from_iterable(_blocks(Path(path), layout))


def read_log_by_time(
    path: str | Path, layout: LogLayout | None = None, run_entries: int = RUN_ENTRIES
) -> Iterator[Event | BadRecord]:
    """Yield every record by time, ties in the file's order; a bad record stays after its event.

    Memory is bounded by `run_entries`: a longer log is sorted through a temporary file. LogFileError as in `read_log`.
    """
    return sorted_by_time(read_log(path, layout), run_entries)


def read_event_log(path: str | Path, layout: LogLayout | None = None, schema: EventSchema = DEFAULT_SCHEMA) -> EventLog:
    """Return the full log as columns, in the order of `read_log_by_time`. LogFileError as in `read_log`."""
    return event_log_from_blocks(_blocks(Path(path), layout), schema)


def write_log(path: str | Path, events: Iterable[Event]) -> int:
    """Write the events in their order as .jsonl, .msgpack or .tsv (with .gz: gzipped); return their number.

    LogFileError for another suffix, a missing folder, or text with a tab or line break inside a .tsv.
    """
    path = Path(path)
    encode, head = _encoder(path)
    count = 0
    source = iter(events)
    try:
        with path.open("wb") as raw, _compressed(path, raw) as file:
            file.write(head)
            while batch := list(islice(source, WRITE_EVENTS)):
                file.write(encode(batch))
                count += len(batch)
    except OSError as error:
        raise LogFileError(f"{path}: cannot be written: {error.strerror or error}") from error
    return count


def _blocks(path: Path, layout: LogLayout | None) -> Iterator[list[LogEntry]]:
    """Open the file and detect its format now; read the blocks lazily."""
    layout = layout or LogLayout()
    try:
        file = _open(path)
        start = file.peek(4096)
        format = layout.format or detect_format(path.name, start)
    except READ_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise LogFileError(f"{path}: cannot be read: {reason or error}") from error
    if format != "text" and layout.columns is not None:
        raise LogFileError(f"{path}: holds {format}, whose fields have names; --columns is for delimited text")
    chunked = ChunkedFile(file)
    if format == "msgpack":
        return msgpack_blocks(chunked)
    return json_blocks(chunked) if format == "json" else text_blocks(chunked, layout, path.name)


def _open(path: Path) -> BufferedReader | gzip.GzipFile:
    with path.open("rb") as file:
        start = file.read(2)
    if start == GZIP_MAGIC:
        return gzip.GzipFile(path)
    if path.suffix == ".gz" and start:
        raise LogFileError(f"{path}: is named .gz but is not gzipped; rename it, or download it again")
    return path.open("rb")


def _compressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix != ".gz":
        return raw
    # No file name and no time inside: equal events give equal bytes. Level 6: half of level 9's time, 1 % larger.
    return gzip.GzipFile("", "wb", 6, raw, mtime=0)  # pyright: ignore[reportReturnType]


def _encoder(path: Path) -> tuple[Callable[[list[Event]], bytes], bytes]:
    """Return a function that encodes a batch, and the bytes that precede the first batch."""
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix in ("jsonl", "json", "ndjson"):
        return _to_json.encode_lines, b""
    if suffix in ("msgpack", "mpk"):
        return lambda batch: b"".join(map(_to_msgpack.encode, batch)), b""
    if suffix == "tsv":
        return lambda batch: b"".join(map(_text_line, batch)), _join_cells(TEXT_FIELDS)
    raise LogFileError(f"{path}: want a name that ends in .jsonl, .msgpack or .tsv, followed by .gz to compress")


def _text_line(event: Event) -> bytes:
    return _join_cells([_cell(value) for value in msgspec.structs.astuple(event)])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return _to_json.encode(value).decode()
    text = str(value)
    if not {"\t", "\n", "\r"}.isdisjoint(text):
        raise LogFileError(f"'{text[:60]}' contains a tab or a line break, which a .tsv cannot hold; write .jsonl")
    return text


def _join_cells(cells: Iterable[str]) -> bytes:
    return ("\t".join(cells) + "\n").encode()
