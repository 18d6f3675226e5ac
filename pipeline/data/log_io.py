"""Read, sort and write recorded logs of events: JSON lines, MessagePack or delimited text, gzipped or not.

A record that cannot be read is yielded as a `BadRecord` at its position: it is neither raised nor silently dropped.
A file that cannot be read at all is a LogFileError with one sentence.
"""

import gzip
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import IO

import msgspec

from pipeline.data.cells import quoted
from pipeline.data.event_log import NO_ALIASES, EventLog, event_log_from_blocks
from pipeline.data.external_sort import RUN_ENTRIES, sorted_by_time
from pipeline.data.layout import BadRecord, LogEntry, LogLayout, detect_format
from pipeline.data.messagepack import msgpack_blocks
from pipeline.data.parser import json_blocks, text_blocks
from pipeline.data.recorded_file import open_recorded
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
    "recognised",
    "write_log",
]

WRITE_EVENTS = 1000
DEFAULT_SCHEMA = EventSchema()
TEXT_FIELDS = tuple(field.name for field in msgspec.structs.fields(Event))

_to_json = msgspec.json.Encoder()
_to_msgpack = msgspec.msgpack.Encoder()


def read_log(path: str | Path, layout: LogLayout | None = None) -> Iterator[LogEntry]:
    """Yield every record in the file's order. LogFileError, at once, when the file cannot be read at all."""
    return chain.from_iterable(_open_blocks(Path(path), layout)[0])


def read_log_by_time(
    path: str | Path, layout: LogLayout | None = None, run_entries: int = RUN_ENTRIES
) -> Iterator[Event | BadRecord]:
    """Yield every record by time, ties in the file's order; a bad record stays after its event.

    Memory is bounded by `run_entries`: a longer log is sorted through a temporary file. LogFileError as in `read_log`.
    """
    return sorted_by_time(read_log(path, layout), run_entries)


def read_event_log(
    path: str | Path,
    layout: LogLayout | None = None,
    schema: EventSchema = DEFAULT_SCHEMA,
    action_aliases: Mapping[str, str] = NO_ALIASES,
) -> EventLog:
    """Return the full log as columns, in the order of `read_log_by_time`. LogFileError as in `read_log`.

    action_aliases: foreign names of the schema's actions, {"addtocart": "cart"}
    """
    return event_log_from_blocks(_open_blocks(Path(path), layout)[0], schema, action_aliases)


def recognised(path: str | Path, layout: LogLayout | None = None) -> tuple[str, ...]:
    """Return what is recognised in a log's first lines and could be wrong, one sentence each. LogFileError as above."""
    return _open_blocks(Path(path), layout)[1]


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


def _open_blocks(path: Path, layout: LogLayout | None) -> tuple[Iterator[list[LogEntry]], tuple[str, ...]]:
    """Open the file and recognise its format now; read the blocks lazily. Returns them, and what was recognised."""
    layout = layout or LogLayout()
    file = open_recorded(path)
    format = layout.format or detect_format(path.name, file.start)
    if format == "text":
        return text_blocks(file, layout, path.name)
    if layout.text_options:
        options = ", ".join(layout.text_options)
        raise LogFileError(f"{path}: holds {format}, whose fields have names; {options} is for delimited text")
    return (json_blocks if format == "json" else msgpack_blocks)(file), ()


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
    if not {"\t", "\n", "\r"}.isdisjoint(text) or text != text.strip(" "):
        raise LogFileError(
            f"'{text[:60]}' contains a tab or a line break, or begins or ends with a blank, which a .tsv cannot hold;"
            " write .jsonl"
        )
    return quoted(text)


def _join_cells(cells: Iterable[str]) -> bytes:
    return ("\t".join(cells) + "\n").encode()
