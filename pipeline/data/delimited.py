"""Delimited text: find the columns that hold an event's fields, and read events from its lines."""

from dataclasses import dataclass

import msgspec

from pipeline.data.cells import NONE_WORDS, CellSplitter
from pipeline.data.layout import (
    EVENT_ALIASES,
    FIELD_BY_ALIAS,
    REQUIRED,
    SKIPPED,
    InvalidLine,
    LogLayout,
    RepeatedHeader,
    column_title,
    find_columns,
)
from pipeline.data.text_records import TextRecords
from pipeline.data.timestamps import FirstNumberReader, TimestampReader, is_time, recognise
from pipeline.errors import LogFileError
from pipeline.records import Event

DEFAULT_ACTION = "rate"
MILLISECOND_NAMES = ("ts_ms", "timestamp_ms")


@dataclass(slots=True, frozen=True)
class FieldColumn:
    """A column to read and the event's field that it holds. title: its name in the header or in `--columns`."""

    field: str
    index: int
    title: str


@dataclass(slots=True, frozen=True)
class DelimitedReader:
    """Reads the records of one log: 1.5 us of one core per line of four columns without quotes, 3.2 with.

    columns:   (field, column index) of each field but `ts_ms`
    ts_column: column index of the time; None when the log has no times: every event then has time 0
    header:    the cells of the header line; None without one
    notes:     what was recognised in the log's first lines, for the user
    """

    splitter: CellSplitter
    width: int
    header: list[str] | None
    columns: tuple[tuple[str, int], ...]
    ts_column: int | None
    times: TimestampReader | FirstNumberReader
    action: str
    notes: tuple[str, ...]

    @classmethod
    def from_records(cls, layout: LogLayout, records: TextRecords, name: str) -> "DelimitedReader":
        """Find the columns in the log's first record, and the unit of its times in the following ones.

        LogFileError when the first record lacks a column that is needed.
        """
        cells = next(records.splitter.split_valid([records.first]), None) or [records.first]
        has_header, columns = _find_event_columns(layout, cells, name)
        ts = next((column for column in columns if column.field == "ts_ms"), None)
        rows = [cells] * (not has_header) + list(records.splitter.split_valid(records.following))
        times, times_note = _recognise_times(layout, ts, rows)
        return cls(
            records.splitter,
            len(cells),
            cells if has_header else None,
            tuple((column.field, column.index) for column in columns if column is not ts),
            ts.index if ts else None,
            times,
            layout.action or DEFAULT_ACTION,
            tuple(filter(None, (_header_note(layout, cells, has_header, ts is not None), times_note))),
        )

    def event(self, record: bytes) -> Event:
        """Return the record's event. InvalidLine says in one sentence what is wrong with it."""
        row: dict = {"action": self.action}
        try:
            cells = self.splitter.split(record.rstrip(b"\r\n").decode())
            if cells == self.header:
                raise RepeatedHeader
            if len(cells) != self.width:
                raise InvalidLine(f"{len(cells)} columns; the first line has {self.width}")
            row["ts_ms"] = 0 if self.ts_column is None else self.times.read(cells[self.ts_column])
            for field, index in self.columns:
                if text := cells[index]:
                    row[field] = text
            if "context" in row:
                row["context"] = msgspec.json.decode(row["context"])
            return msgspec.convert(row, Event, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidLine(f"not an event: {error}{_got(row, str(error))}") from error


def _got(row: dict, reason: str) -> str:
    """Return the content of the field that a reason names at its end, as msgspec's do; empty when it names none."""
    field = reason.rpartition("$.")[2].removesuffix("`")
    return f", got '{str(row[field])[:40]}'" if field in row else ""


def _recognise_times(
    layout: LogLayout, ts: FieldColumn | None, rows: list[list[str]]
) -> tuple[TimestampReader | FirstNumberReader, str]:
    if ts is None:
        return recognise([], None)
    unit = layout.unit or ("ms" if ts.title in MILLISECOND_NAMES else None)
    return recognise([cells[ts.index] for cells in rows if ts.index < len(cells)], unit)


def _header_note(layout: LogLayout, cells: list[str], has_header: bool, has_times: bool) -> str:
    """Return how the first line was taken, where that is a guess."""
    if layout.columns is None or layout.by_name or layout.header is not None or (has_times and not has_header):
        return ""
    taken = "a header; --no-header reads it as an event" if has_header else "an event; --header skips it"
    return f"the first line, '{' '.join(cells)[:60]}', is taken for {taken}"


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
    """Whether all cells are field names, or the time's cell is neither empty nor a time."""
    if all(column_title(cells[column.index]).lower() in FIELD_BY_ALIAS for column in columns):
        return True
    times = [cells[column.index] for column in columns if column.field == "ts_ms"]
    return any(cell and cell.lower() not in NONE_WORDS and not is_time(cell) for cell in times)


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
