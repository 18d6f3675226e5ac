"""How a recorded log is laid out, and what stands in for a record of it that cannot be read."""

import re

import msgspec

from pipeline.errors import LogFileError
from pipeline.records import Event

FORMATS = ("json", "msgpack", "text")
UNITS_MS = {"s": 1000, "ms": 1}
SKIPPED = ("", "-", "_")  # a place in `--columns` that is not read
WORDS = ("user", "item", "action", "ts", "value", "dwell", "session", "device", "position", "context")
REQUIRED = ("user_id", "item_id")  # and a time, unless --columns says that there is none
ALIASES = {
    "user_id": ("user_id", "user", "userid", "uid", "visitorid", "customer_id"),
    "item_id": ("item_id", "item", "itemid", "iid", "movieid", "movie_id", "product_id", "video_id"),
    "action": ("action", "event", "event_type", "behavior", "behaviour", "behavior_type"),
    "ts_ms": ("ts_ms", "timestamp_ms", "ts", "timestamp", "time", "event_time"),
    "value": ("value", "rating", "price"),
    "dwell_ms": ("dwell_ms", "dwell"),
    "session_id": ("session_id", "session", "user_session"),
    "device": ("device",),
    "position": ("position",),
    "context": ("context",),
}  # of several in one header the first named here is read
FIELDS = {alias: field for field, aliases in ALIASES.items() for alias in aliases}

_SUFFIXES = {"jsonl": "json", "ndjson": "json", "json": "json", "msgpack": "msgpack", "mpk": "msgpack", "tsv": "text"}
_SUFFIXES |= dict.fromkeys(("csv", "inter", "dat", "data", "txt"), "text")
_GARBAGE = re.compile(rb"[\x00-\x08\x0e-\x1f]")


class BadRecord(msgspec.Struct, frozen=True):
    """A record that could not be read. line: its number from 1 (MessagePack: the record's); reason: one sentence."""

    line: int
    raw: bytes
    reason: str


LogEntry = Event | BadRecord


class InvalidLine(ValueError):
    """Its text is the bad record's reason."""


class LogLayout(msgspec.Struct, frozen=True):
    """How to read a log; what is None is detected. All but `format` says how to read delimited text.

    columns:   field names by place (`user`, `item`, `ts`, ...; `-` skips one), or `field=header` pairs; without `ts`
               the log has no times: an event's place is its time, in milliseconds
    separator: tab, comma or `::` when detected
    header:    whether the first line names the columns
    unit:      `s` or `ms`; detected for each timestamp: below 1e11 it counts seconds
    action:    of every event where no column holds one
    LogFileError for a word that means nothing.
    """

    format: str | None = None
    columns: tuple[str, ...] | None = None
    separator: str | None = None
    header: bool | None = None
    unit: str | None = None
    action: str = "rate"

    @classmethod
    def parse(
        cls,
        columns: str | None = None,
        *,
        action: str | None = None,
        separator: str | None = None,
        unit: str | None = None,
        header: bool | None = None,
        format: str | None = None,
    ) -> "LogLayout":
        """From the command line's words."""
        names = None if columns is None else tuple(name.strip() for name in columns.split(","))
        return cls(format, names, separator, header, unit, action or "rate")

    def __post_init__(self) -> None:
        _check_columns(self.columns, self.header)
        _check(self.format, FORMATS, "format")
        _check(self.unit, tuple(UNITS_MS), "timestamp unit")
        if self.separator == "":
            raise LogFileError("the separator is empty; want one or more characters, such as ';'")

    @property
    def by_name(self) -> bool:
        return self.columns is not None and "=" in self.columns[0]  # all are alike


def detect_format(name: str, start: bytes) -> str:
    """By the file's suffix (gzip's put aside), or by its first bytes. LogFileError when neither tells."""
    suffix = name.lower().removesuffix(".gz").rpartition(".")[2]
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    known = _SUFFIXES.get(suffix) or _format_by_content(start, text)
    if known is None:
        raise LogFileError(f"{name}: neither JSON lines, MessagePack nor delimited text by its name or first bytes")
    if known == "json" and text.startswith(b"["):
        raise LogFileError(f"{name}: starts with '[', a JSON array; want JSON lines: one object a line")
    return known


def _format_by_content(start: bytes, text: bytes) -> str | None:
    if text.startswith((b"{", b"[")):
        return "json"
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # a MessagePack map
        return "msgpack"
    return None if _GARBAGE.search(start) else "text"


def _check(value: str | None, known: tuple[str, ...], what: str) -> None:
    if value is not None and value not in known:
        raise LogFileError(f"{what} '{value}': want one of {', '.join(known)}")


def _check_columns(names: tuple[str, ...] | None, header: bool | None) -> None:
    if names is None:
        return
    if len({"=" in name for name in names}) > 1:
        raise LogFileError(f"--columns {','.join(names)}: give all by place (user,item,ts) or all as field=header")
    if "=" in "".join(names) and header is False:
        raise LogFileError(f"--columns {','.join(names)}: names header columns, but the log is said to have no header")
    fields = [_field(name.partition("=")[0]) for name in names if name not in SKIPPED]
    if twice := next((field for field in fields if fields.count(field) > 1), None):
        raise LogFileError(f"--columns {','.join(names)}: names {twice} twice")
    if missing := [field for field in REQUIRED if field not in fields]:
        raise LogFileError(f"--columns {','.join(names)}: has no {', '.join(missing)}; want at least user and item")


def _field(name: str) -> str:
    if name not in FIELDS:
        raise LogFileError(f"--columns: no field is called '{name}'; want {', '.join(WORDS)}, or - to skip a column")
    return FIELDS[name]
