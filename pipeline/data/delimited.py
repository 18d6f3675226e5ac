"""Delimited text: which column holds which field of an event, and events out of its lines."""

import csv
import math
from dataclasses import dataclass

import msgspec

from pipeline.data.layout import ALIASES, FIELDS, REQUIRED, SKIPPED, UNITS_MS, InvalidLine, LogLayout
from pipeline.errors import LogFileError
from pipeline.records import Event

SEPARATORS = ("\t", "::", ",")
SECONDS_BELOW = 1e11  # as seconds the year 5138, as milliseconds March 1973
MILLISECOND_NAMES = ("ts_ms", "timestamp_ms")


@dataclass(slots=True, frozen=True)
class DelimitedReader:
    """One log's columns. places: field -> column, without `ts_ms`; ts_place: None if the log has no times, every event
    then has time 0; scale: milliseconds a timestamp unit, None: detect.

    2.4 us of one core a line of four columns (python -m timeit).
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
        """From the log's first line. LogFileError when it does not have the columns."""
        separator = layout.separator or _separator(first, name)
        cells = _cells(first, separator)
        has_header, columns = _columns(layout, cells, name)
        ts_name = next((title for field, _, title in columns if field == "ts_ms"), None)
        unit = layout.unit or ("ms" if ts_name in MILLISECOND_NAMES else None)
        places = {field: place for field, place, _ in columns}
        return cls(
            separator,
            len(cells),
            has_header,
            tuple((field, place) for field, place in places.items() if field != "ts_ms"),
            places.get("ts_ms"),
            UNITS_MS[unit] if unit else None,
            layout.action,
        )

    def event(self, line: bytes) -> Event:
        """Unreadable says in one sentence what is wrong with the line."""
        row: dict = {"action": self.action}
        try:
            cells = _cells(line.rstrip(b"\r\n").decode(), self.separator)
            if len(cells) != self.width:
                raise InvalidLine(f"{len(cells)} columns; the first line has {self.width}")
            row["ts_ms"] = 0 if self.ts_column is None else self._ts_ms(cells[self.ts_column])
            for field, place in self.columns:
                if text := cells[place]:
                    row[field] = text
            if "context" in row:
                row["context"] = msgspec.json.decode(row["context"])
            event = msgspec.convert(row, Event, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError, csv.Error) as error:
            raise InvalidLine(f"not an event: {error}{_got(row, str(error))}") from error
        if event.value is not None and not math.isfinite(event.value):
            raise InvalidLine(f"value is {event.value}; wanted a finite number of at least 0")
        return event

    def _ts_ms(self, text: str) -> int:
        try:
            number = int(text) if text.isdecimal() else float(text)
            scale = self.scale or (1000 if number < SECONDS_BELOW else 1)
            return round(number * scale)
        except (ValueError, OverflowError) as error:  # inf and nan, too
            raise InvalidLine(f"timestamp '{text[:40]}' is no number of seconds or milliseconds") from error


def _got(row: dict, reason: str) -> str:
    """What stands in the field that a reason names at its end, as msgspec's do."""
    field = reason.rpartition("$.")[2].removesuffix("`")
    return f", got '{str(row[field])[:40]}'" if field in row else ""


def _cells(line: str, separator: str) -> list[str]:
    if separator == "," and '"' in line:
        return next(csv.reader([line]))
    return line.split(separator)


def _separator(first: str, name: str) -> str:
    for separator in SEPARATORS:
        if separator in first:
            return separator
    raise LogFileError(f"{name}: no tab, '::' or comma in its first line '{first[:60]}'; give the separator")


def _columns(layout: LogLayout, cells: list[str], name: str) -> tuple[bool, list[tuple[str, int, str]]]:
    """Whether the first line is a header, and (field, place, the column's name) of each that is read."""
    if layout.columns is None or layout.by_name:
        return True, _by_header(layout, cells, name)
    columns = [(FIELDS[title], place, title) for place, title in enumerate(layout.columns) if title not in SKIPPED]
    if columns[-1][1] >= len(cells):
        raise LogFileError(f"{name}: --columns names {columns[-1][1] + 1} columns; the first line has {len(cells)}")
    return _is_header(columns, cells) if layout.header is None else layout.header, columns


def _is_header(columns: list[tuple[str, int, str]], cells: list[str]) -> bool:
    """Where a time should stand there is no number; without times: every column has a field's name."""
    ts_place = next((place for field, place, _ in columns if field == "ts_ms"), None)
    if ts_place is not None:
        return not _is_number(cells[ts_place])
    return all(_title(cells[place]).lower() in FIELDS for _, place, _ in columns)


def _title(cell: str) -> str:
    return cell.strip().partition(":")[0]  # RecBole: name:type


def _by_header(layout: LogLayout, cells: list[str], name: str) -> list[tuple[str, int, str]]:
    titles = [_title(cell) for cell in cells]
    if layout.columns is not None:
        pairs = [pair.partition("=")[::2] for pair in layout.columns]
        if absent := [title for _, title in pairs if title not in titles]:
            raise LogFileError(f"{name}: has no column {', '.join(absent)}; its header names {', '.join(titles)[:300]}")
        return [(FIELDS[field], titles.index(title), title) for field, title in pairs]
    lower = [title.lower() for title in titles]
    found = [
        (field, lower.index(alias), alias)
        for field, aliases in ALIASES.items()
        if (alias := next((alias for alias in aliases if alias in lower), None))
    ]
    if missing := [field for field in (*REQUIRED, "ts_ms") if field not in {field for field, _, _ in found}]:
        raise LogFileError(
            f"{name}: no header that names {', '.join(missing)} in its first line '{', '.join(titles)[:120]}'; "
            "say what the columns hold with --columns user,item,ts (user,item where there are no times)"
        )
    return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
