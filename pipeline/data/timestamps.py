"""Times in delimited text: numbers since 1970, in one unit per log, or ISO 8601 dates."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.data.layout import UNITS, InvalidLine

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
MAX_NUMBER = 1e300  # a greater one cannot be multiplied
# A number below 1e11 counts seconds (to the year 5138; as milliseconds it would be before March 1973), and so on.
RANGES = {"s": (-MAX_NUMBER, 1e11), "ms": (1e11, 1e14), "us": (1e14, 1e17), "ns": (1e17, math.inf)}


@dataclass(slots=True, frozen=True)
class TimestampReader:
    """Reads the times of one log as milliseconds since 1970.

    unit: of numbers, a key of UNITS; None when the log's first times are all dates
    low, high: the range of numbers that count this unit by their size; read as this unit, one outside would become a
               time that is wrong by decades without a word
    multiplier, divisor: from numbers to milliseconds
    """

    unit: str | None
    low: float
    high: float
    multiplier: int
    divisor: int

    @classmethod
    def from_unit(cls, unit: str | None, is_detected: bool) -> "TimestampReader":
        """Return a reader of numbers of this unit, of any size if it was given instead of detected."""
        if unit is None:
            return cls(None, 0, 0, 0, 1)
        return cls(unit, *(RANGES[unit] if is_detected else (-MAX_NUMBER, MAX_NUMBER)), *UNITS[unit])

    def read(self, text: str) -> int:
        """Return the time in milliseconds. InvalidLine for text that is not a time of this log."""
        if text.isdecimal() and len(text) < 20:  # 0.2 us instead of 0.4
            number = int(text)
            if self.low <= number < self.high:
                return number * self.multiplier // self.divisor
        return self._read_other(text)

    def _read_other(self, text: str) -> int:
        try:
            number = float(text)
        except ValueError:
            return _date_ms(_parse_date(text))
        if self.low <= number < self.high:
            return round(number * self.multiplier / self.divisor)
        if not math.isfinite(number):
            raise InvalidLine(_not_a_time(text))
        counted = UNIT_NAMES[_unit_by_size(number)]
        expected = UNIT_NAMES[self.unit] if self.unit else "dates"
        raise InvalidLine(
            f"timestamp '{text[:40]}' counts {counted} by its size; the log's first are {expected}; give --unit"
        )


def recognise(cells: Iterable[str], unit: str | None) -> tuple[TimestampReader, str]:
    """Return a reader for a log whose first times are these, and how they are read, for the user.

    unit: as given; None: the one that most of the numbers count by their size
    """
    times = list(filter(is_time, cells))
    dates = [_parse_date(cell) for cell in times if not _is_number(cell)]
    units = Counter(_unit_by_size(float(cell)) for cell in times if _is_number(cell)).most_common(1)
    detected = units[0][0] if units and unit is None else None
    read_as = [f"{UNIT_NAMES[detected]} since 1970 (UTC)"] if detected else []
    read_as += ["ISO 8601 dates"] if dates else []
    zone = ", in UTC where they name no zone" if any(date.tzinfo is None for date in dates) else ""
    note = f"timestamps are read as {' and '.join(read_as)}{zone}" if read_as else ""
    return TimestampReader.from_unit(unit or detected, is_detected=unit is None), note


def is_time(text: str) -> bool:
    """Whether the text is a finite number or a date."""
    if _is_number(text):
        return True
    try:
        return bool(_parse_date(text))
    except InvalidLine:
        return False


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unit_by_size(number: float) -> str:
    return next(unit for unit, (_, high) in RANGES.items() if number < high)


def _parse_date(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.removesuffix(" UTC"))
    except ValueError as error:
        raise InvalidLine(_not_a_time(text)) from error


def _date_ms(date: datetime) -> int:
    return ((date if date.tzinfo else date.replace(tzinfo=UTC)) - EPOCH) // MILLISECOND


def _not_a_time(text: str) -> str:
    return f"timestamp '{text[:40]}' is not a number of seconds or smaller units, nor an ISO 8601 date"
