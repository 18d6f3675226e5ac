"""Layouts of recorded logs: formats, column names, and the placeholder for a record that cannot be read."""

import re
from collections.abc import Mapping, Sequence

import msgspec

from pipeline.errors import LogFileError
from pipeline.records import Event

FORMATS = ("json", "msgpack", "text")
UNITS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}  # multiplier and divisor to milliseconds
SKIPPED = ("", "-", "_")  # names in `--columns` for a column that is not read
SHORT_NAMES = ("user", "item", "action", "ts", "value", "dwell", "session", "device", "position", "context")
REQUIRED = ("user_id", "item_id")  # and a time, unless --columns leaves it out
EVENT_ALIASES = {
    "user_id": ("user_id", "user", "userid", "uid", "visitorid", "customer_id", "customer"),
    "item_id": ("item_id", "item", "itemid", "iid", "movieid", "movie_id", "product_id", "video_id", "product", "sku"),
    "action": ("action", "event", "event_type", "behavior", "behaviour", "behavior_type"),
    "ts_ms": ("ts_ms", "timestamp_ms", "ts", "timestamp", "time", "event_time"),
    "value": ("value", "rating", "price"),
    "dwell_ms": ("dwell_ms", "dwell"),
    "session_id": ("session_id", "session", "user_session"),
    "device": ("device",),
    "position": ("position",),
    "context": ("context",),
}
FIELD_BY_ALIAS = {alias: field for field, aliases in EVENT_ALIASES.items() for alias in aliases}

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # of a record; a deep one recurses too far

_SUFFIXES = {"jsonl": "json", "ndjson": "json", "json": "json", "msgpack": "msgpack", "mpk": "msgpack", "tsv": "text"}
_SUFFIXES |= dict.fromkeys(("csv", "inter", "dat", "data", "txt"), "text")
_CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0e-\x1f]")


class BadRecord(msgspec.Struct, frozen=True):
    """A record that could not be read. line: its number from 1 (MessagePack: the record's); reason: one sentence."""

    line: int
    raw: bytes
    reason: str


LogEntry = Event | BadRecord


class InvalidLine(ValueError):
    """A line that does not hold a record; the message is the bad record's reason."""


class RepeatedHeader(InvalidLine):
    """A line that is the header again, as in concatenated files. It is not a record."""


class LogLayout(msgspec.Struct, frozen=True):
    """Describes how to read a log; None means 'detect'. All fields but `format` concern delimited text.

    columns:   field names by position (`user`, `item`, `ts`, ...; `-` skips one), or `field=header` pairs; without `ts`
               the log has no times: an event's position in the log is its time, in milliseconds
    separator: tab, `::`, comma or semicolon when detected
    header:    whether the first line names the columns
    unit:      of numbers that are times: `s`, `ms`, `us` or `ns`; detected by the size of the log's first ones
    action:    action of every event when no column holds one; None: `rate`
    Raises LogFileError for an unknown format, field or unit, and for the unit of a log without times.
    """

    format: str | None = None
    columns: tuple[str, ...] | None = None
    separator: str | None = None
    header: bool | None = None
    unit: str | None = None
    action: str | None = None

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
        """Parse the command line's options; `columns` is comma-separated."""
        names = None if columns is None else tuple(name.strip() for name in columns.split(","))
        return cls(format, names, separator, header, unit, action)

    def __post_init__(self) -> None:
        _check_columns(self.columns, self.header)
        _check_choice(self.format, FORMATS, "format")
        _check_choice(self.unit, tuple(UNITS), "timestamp unit")
        if self.unit is not None and self.columns is not None and "ts_ms" not in _fields(self.columns):
            raise LogFileError(
                f"--unit {self.unit}: --columns {','.join(self.columns)} names no ts, so it has no effect"
            )
        if self.separator == "":
            raise LogFileError("the separator is empty; want one or more characters, such as ';'")

    @property
    def text_options(self) -> list[str]:
        """The given options that concern delimited text alone."""
        options = {
            "--columns": self.columns,
            "--separator": self.separator,
            "--unit": self.unit,
            "--action": self.action,
        }
        given = [name for name, value in options.items() if value is not None]
        return given + ([] if self.header is None else ["--header" if self.header else "--no-header"])

    @property
    def by_name(self) -> bool:
        """Whether `columns` are field=header pairs."""
        return self.columns is not None and "=" in self.columns[0]  # __post_init__ allows no mixture


def column_title(cell: str) -> str:
    """Return the name in a header cell, without RecBole's `:type`."""
    return cell.partition(":")[0].strip()


def find_columns(titles: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return {field: index of its column}; of several aliases in one header the first in `aliases` wins.

    titles: column names in lower case.
    """
    present = ((field, next((alias for alias in names if alias in titles), None)) for field, names in aliases.items())
    return {field: titles.index(alias) for field, alias in present if alias is not None}


def detect_format(name: str, start: bytes) -> str:
    """Return the format by the file's suffix (before `.gz`) or its first bytes. LogFileError for an unknown one."""
    suffix = name.lower().removesuffix(".gz").rpartition(".")[2]
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    detected = _SUFFIXES.get(suffix) or _format_by_content(start, text)
    if detected is None:
        raise LogFileError(f"{name}: neither JSON lines, MessagePack nor delimited text by its name or first bytes")
    if detected == "json" and text.startswith(b"["):
        raise LogFileError(f"{name}: starts with '[', a JSON array; want JSON lines: one object per line")
    return detected


def _format_by_content(start: bytes, text: bytes) -> str | None:
    if text.startswith((b"{", b"[")):
        return "json"
    if start[:1] and (0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # a MessagePack map
        return "msgpack"
    return None if _CONTROL_BYTES.search(start) else "text"


def _check_choice(value: str | None, choices: tuple[str, ...], what: str) -> None:
    if value is not None and value not in choices:
        raise LogFileError(f"{what} '{value}': want one of {', '.join(choices)}")


def _check_columns(names: tuple[str, ...] | None, header: bool | None) -> None:
    if names is None:
        if header is False:
            raise LogFileError("--no-header: without a header the columns have no names; give --columns user,item,ts")
        return
    option = f"--columns {','.join(names)}"
    if len({"=" in name for name in names}) > 1:
        raise LogFileError(f"{option}: give all by position (user,item,ts) or all as field=header")
    if "=" in "".join(names) and header is False:
        raise LogFileError(f"{option}: refers to header names, but the layout says that there is no header")
    fields = _fields(names)
    if duplicate := next((field for field in fields if fields.count(field) > 1), None):
        raise LogFileError(f"{option}: names {duplicate} twice")
    if missing := [field for field in REQUIRED if field not in fields]:
        raise LogFileError(f"{option}: has no {', '.join(missing)}; want at least user and item")


def _fields(columns: tuple[str, ...]) -> list[str]:
    return [_field(name.partition("=")[0]) for name in columns if name not in SKIPPED]


def _field(name: str) -> str:
    if name not in FIELD_BY_ALIAS:
        raise LogFileError(f"--columns: unknown field '{name}'; want {', '.join(SHORT_NAMES)}, or - to skip a column")
    return FIELD_BY_ALIAS[name]
