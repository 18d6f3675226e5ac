"""Delimited text: find the columns that hold an event's fields, and read events from its lines."""

import csv
import math
from dataclasses import dataclass

import msgspec

from pipeline.data.layout import (
    EVENT_ALIASES,
    FIELD_BY_ALIAS,
    REQUIRED,
    SKIPPED,
    UNITS_MS,
    InvalidLine,
    LogLayout,
    column_title,
    find_columns,
)
from pipeline.errors import LogFileError
from pipeline.records import Event

SEPARATORS = ("\t", "::", ",")
SECONDS_BELOW = 1e11  # as seconds the year 5138, as milliseconds March 1973
MILLISECOND_NAMES = ("ts_ms", "timestamp_ms")


@dataclass(slots=True, frozen=True)
class FieldColumn:
    """A column to read and the event's field that it holds. title: its name in the header or in `--columns`."""

    field: str
    index: int
    title: str


@dataclass(slots=True, frozen=True)
class DelimitedReader:
    """Reads the lines of one log: 2.4 us of one core per line of four columns (python -m timeit).

    columns:   (field, column index) of each field but `ts_ms`
    ts_column: column index of the time; None when the log has no times: every event then has time 0
    scale:     milliseconds per timestamp unit; None: detect
    """

    separator: str
    width: int
    has_header: bool
    columns: tuple[tuple[str, int], ...]
    ts_column: int | None
    scale: int | None
    action: str

    @classmethod
    def from_first_line(cls, layout: LogLayout, first: str, name: str) -> "DelimitedReader":
        """Find the columns in the log's first line. LogFileError when it lacks one that is needed."""
        separator = layout.separator or _detect_separator(first, name)
        cells = _split(first, separator)
        has_header, columns = _find_event_columns(layout, cells, name)
        ts = next((column for column in columns if column.field == "ts_ms"), None)
        unit = layout.unit or ("ms" if ts and ts.title in MILLISECOND_NAMES else None)
        return cls(
            separator,
            len(cells),
            has_header,
            tuple((column.field, column.index) for column in columns if column is not ts),
            ts.index if ts else None,
            UNITS_MS[unit] if unit else None,
            layout.action,
        )

    def event(self, line: bytes) -> Event:
        """Return the line's event. InvalidLine says in one sentence what is wrong with it."""
        row: dict = {"action": self.action}
        try:
            cells = _split(line.rstrip(b"\r\n").decode(), self.separator)
            if len(cells) != self.width:
                raise InvalidLine(f"{len(cells)} columns; the first line has {self.width}")
            row["ts_ms"] = 0 if self.ts_column is None else self._ts_ms(cells[self.ts_column])
            for field, index in self.columns:
                if text := cells[index]:
                    row[field] = text
            if "context" in row:
                row["context"] = msgspec.json.decode(row["context"])
            return msgspec.convert(row, Event, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError, csv.Error) as error:
            raise InvalidLine(f"not an event: {error}{_got(row, str(error))}") from error

    def _ts_ms(self, text: str) -> int:
        try:
            number = int(text) if text.isdecimal() else float(text)
            scale = self.scale or (1000 if number < SECONDS_BELOW else 1)
            return round(number * scale)
        except (ValueError, OverflowError) as error:  # inf and nan, too
            raise InvalidLine(f"timestamp '{text[:40]}' is not a number of seconds or milliseconds") from error


def _got(row: dict, reason: str) -> str:
    """Return the content of the field that a reason names at its end, as msgspec's do; empty when it names none."""
    field = reason.rpartition("$.")[2].removesuffix("`")
    return f", got '{str(row[field])[:40]}'" if field in row else ""


def _split(line: str, separator: str) -> list[str]:
    if separator == "," and '"' in line:
        return next(csv.reader([line]))
    return line.split(separator)


def _detect_separator(first: str, name: str) -> str:
    for separator in SEPARATORS:
        if separator in first:
            return separator
    raise LogFileError(f"{name}: no tab, '::' or comma in its first line '{first[:60]}'; give the separator")


def _find_event_columns(layout: LogLayout, cells: list[str], name: str) -> tuple[bool, list[FieldColumn]]:
    """Return whether the first line is a header, and the columns to read."""
    if layout.columns is None:
        return True, _columns_by_alias(cells, name)
    if layout.by_name:
        return True, _columns_by_title(layout.columns, cells, name)
    columns = [
        FieldColumn(FIELD_BY_ALIAS[title], index, title)
        for index, title in enumerate(layout.columns)
        if title not in SKIPPED
    ]
    if columns[-1].index >= len(cells):
        raise LogFileError(f"{name}: --columns names {columns[-1].index + 1} columns; the first line has {len(cells)}")
    return _is_header(columns, cells) if layout.header is None else layout.header, columns


def _is_header(columns: list[FieldColumn], cells: list[str]) -> bool:
    """Whether the time's cell is not a number or, in a log without times, all cells are field names."""
    ts = next((column for column in columns if column.field == "ts_ms"), None)
    if ts is not None:
        return not _is_number(cells[ts.index])
    return all(column_title(cells[column.index]).lower() in FIELD_BY_ALIAS for column in columns)


def _columns_by_title(pairs: tuple[str, ...], cells: list[str], name: str) -> list[FieldColumn]:
    titles = [column_title(cell) for cell in cells]
    requested = [pair.partition("=")[::2] for pair in pairs]
    if absent := [title for _, title in requested if title not in titles]:
        raise LogFileError(f"{name}: has no column {', '.join(absent)}; its header names {', '.join(titles)[:300]}")
    return [FieldColumn(FIELD_BY_ALIAS[field], titles.index(title), title) for field, title in requested]


def _columns_by_alias(cells: list[str], name: str) -> list[FieldColumn]:
    titles = [column_title(cell) for cell in cells]
    lower = [title.lower() for title in titles]
    found = find_columns(lower, EVENT_ALIASES)
    if missing := [field for field in (*REQUIRED, "ts_ms") if field not in found]:
        raise LogFileError(
            f"{name}: no header that names {', '.join(missing)} in its first line '{', '.join(titles)[:120]}'; "
            "name the columns with --columns user,item,ts (user,item for a log without times)"
        )
    return [FieldColumn(field, index, lower[index]) for field, index in found.items()]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
