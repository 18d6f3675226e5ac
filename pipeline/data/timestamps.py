"""Times in delimited text: numbers since 1970, in one unit per log, or ISO 8601 dates.

Eight digits are a number of seconds in August 1970, or a date without hyphens (20191003): the latter in a log of dates.
"""

import math
from collections import Counter
from collections.abc import Sequence
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
    has_dates: whether most of the log's first times are dates: eight digits are then a date
    """

    unit: str | None
    low: float
    high: float
    multiplier: int
    divisor: int
    has_dates: bool

    @classmethod
    def of_given(cls, unit: str) -> "TimestampReader":
        """Return a reader of numbers of this unit, of any size."""
        return cls(unit, -MAX_NUMBER, MAX_NUMBER, *UNITS[unit], has_dates=False)

    @classmethod
    def of_detected(cls, unit: str | None, has_dates: bool) -> "TimestampReader":
        """Return a reader of the numbers that count this unit by their size; of no number without one."""
        if unit is None:
            return cls(None, 0, 0, 0, 1, has_dates)
        return cls(unit, *RANGES[unit], *UNITS[unit], has_dates)

    def read(self, text: str) -> int:
        """Return the time in milliseconds. InvalidLine for text that is not a time of this log."""
        if text.isdecimal() and len(text) < 20 and not self.has_dates:  # 0.2 us instead of 0.4
            number = int(text)
            if self.low <= number < self.high:
                return number * self.multiplier // self.divisor
        return self._read_other(text)

    def _read_other(self, text: str) -> int:
        if self.has_dates and _is_compact_date(text):
            return _date_ms(_parse_date(text))
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


DATES_ALONE = TimestampReader.of_detected(None, has_dates=False)


@dataclass(slots=True)
class FirstNumberReader:
    """Reads the times of a log whose first lines have none: the first number decides how the others are read."""

    _reader: TimestampReader = DATES_ALONE
    _is_decided: bool = False

    def read(self, text: str) -> int:
        """Return the time in milliseconds. InvalidLine for text that is not a time of this log."""
        if not self._is_decided and _is_number(text):
            self._reader = _detect([text])
            self._is_decided = True
        return self._reader.read(text)


def recognise(cells: Sequence[str], unit: str | None) -> tuple[TimestampReader | FirstNumberReader, str]:
    """Return a reader for a log in whose first lines these are the times, and how they are read, for the user.

    unit: as given; None: the one that most of the numbers count by their size
    """
    times = list(filter(is_time, cells))
    if unit is not None:
        return TimestampReader.of_given(unit), _note(None, [time for time in times if not _is_number(time)])
    if not times:
        note = f"none of its first {len(cells):,} records has a time: the first number decides the unit"
        return FirstNumberReader(), note if cells else ""
    reader = _detect(times)
    return reader, _note(reader.unit, [time for time in times if _is_date(time, reader.has_dates)])


def _detect(times: list[str]) -> TimestampReader:
    """Return a reader of these times. Eight digits are dates if most of them can be: of numbers 4 % can."""
    has_dates = 2 * sum(_is_date(time, compact=True) for time in times) > len(times)
    numbers = [float(time) for time in times if not _is_date(time, has_dates)]
    units = Counter(map(_unit_by_size, numbers)).most_common(1)
    return TimestampReader.of_detected(units[0][0] if units else None, has_dates)


def _note(unit: str | None, dates: list[str]) -> str:
    read_as = [f"{UNIT_NAMES[unit]} since 1970 (UTC)"] if unit else []
    read_as += ["ISO 8601 dates"] if dates else []
    zone = ", in UTC where they name no zone" if any(_parse_date(date).tzinfo is None for date in dates) else ""
    return f"timestamps are read as {' and '.join(read_as)}{zone}" if read_as else ""


def is_time(text: str) -> bool:
    """Whether the text is a finite number or a date."""
    return _is_number(text) or _is_date_text(text)


def _is_date_text(text: str) -> bool:
    try:
        return bool(_parse_date(text))
    except InvalidLine:
        return False


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_date(time: str, compact: bool) -> bool:
    """Whether the time is a date. compact: eight digits may be one."""
    return not _is_number(time) or (compact and _is_compact_date(time))


def _is_compact_date(text: str) -> bool:
    """Whether the text is a date of the years 1900 to 2099 without hyphens."""
    return len(text) == 8 and text.startswith(("19", "20")) and text.isdecimal() and _is_date_text(text)


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
