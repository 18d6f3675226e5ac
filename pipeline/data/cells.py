"""Cells of delimited text (RFC 4180), quoted and unquoted.

A quoted cell begins with a quote and ends with one before the next separator; inside, two quotes stand for one. Any
other quote is text, as in `7" single`. The csv module cannot say which cells had quotes, so blanks around a cell could
not be told from blanks inside its quotes; and to it a lone quote opens a cell that nothing but the file's end closes.
"""

import re
from collections.abc import Iterable, Iterator

from pipeline.data.layout import InvalidLine
from pipeline.errors import LogFileError

SEPARATORS = ("\t", "::", ",", ";")  # as detected: the first one that the first line contains
NONE_WORDS = {"(no genres listed)", "n/a", "nan", "none", "null", r"\n", "-"}  # in lower case; \N: of databases


class OpenQuoteError(InvalidLine):
    """A record in which a quoted cell begins and does not end."""


class CellSplitter:
    """Splits records into cells and strips the unquoted ones. With a separator of several characters none is quoted."""

    def __init__(self, separator: str) -> None:
        self.separator = separator
        self.has_quotes = len(separator) == 1 and separator != '"'
        self._blanks = " \t".replace(separator, "")
        self._has_tabs = separator != "\t"  # as blanks
        begin = rf'[{self._blanks}]*"([^"]*+(?:""[^"]*+)*+)'
        end = rf'"[{self._blanks}]*(?={re.escape(separator)}|\Z)'
        self._quoted_cell = re.compile(rf"{begin}(?:{end}|(\Z))")

    def split(self, record: str) -> list[str]:
        """Return the record's cells. OpenQuoteError when the last one is quoted and not closed."""
        if '"' in record and self.has_quotes:
            return self._split_quoted(record)
        cells = record.split(self.separator)
        if " " in record or (self._has_tabs and "\t" in record):
            return [cell.strip(self._blanks) for cell in cells]
        return cells

    def split_closed(self, records: Iterable[str]) -> Iterator[list[str]]:
        """Yield the cells of the records whose quoted cells are all closed."""
        for record in records:
            try:
                yield self.split(record)
            except OpenQuoteError:
                continue

    def count(self, record: bytes) -> int | None:
        """Return the number of cells; None when the last one is quoted and not closed."""
        return next((len(cells) for cells in self.split_closed([record.decode("utf-8", "replace")])), None)

    def _split_quoted(self, record: str) -> list[str]:
        plain = record[1:-1].split(f'"{self.separator}"')
        if record[0] == record[-1] == '"' and record.count('"') == 2 * len(plain):
            return plain  # all quoted, no quotes inside: 1 us for four cells instead of 4
        cells = []
        end = -1
        while end < len(record):
            start = end + 1
            if quoted := self._quoted_cell.match(record, start):
                if quoted[2] is not None:
                    raise OpenQuoteError(f"the quote of cell {len(cells) + 1}, '{quoted[0][:40]}', is not closed")
                end = quoted.end()
                cells.append(quoted[1].replace('""', '"'))
            else:
                end = record.find(self.separator, start)
                end = len(record) if end < 0 else end
                cells.append(record[start:end].strip(self._blanks))
        return cells


def quoted(text: str) -> str:
    """Return the cell that CellSplitter reads as this text, with quotes where it needs them."""
    if text.startswith('"') or text != text.strip(" \t"):
        return '"' + text.replace('"', '""') + '"'
    return text


def detect_separator(lines: str, name: str) -> str:
    """Return the separator of the first of these lines, or of the record that begins on it. LogFileError without one.

    name: of the file
    """
    first = lines.partition("\n")[0]
    for text in (first, lines):
        unquoted = re.sub(r'"[^"]*"', "", text).partition("\n")[0]
        for separator in SEPARATORS:
            if separator in unquoted:
                return separator
    raise LogFileError(f"{name}: no tab, '::', comma or semicolon in its first line '{first[:60]}'")
