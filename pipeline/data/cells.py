"""Cells of delimited text (RFC 4180) by the csv module, one record at a time.

A cell that begins with a quote is quoted; any other quote is text, as in `7" single`. To the csv module a lone quote
opens a cell that nothing but the end of its input closes: given one record, it can take no more than that. On one line
text may follow a closing quote, as in `"A" and "B"`; over several lines such text shows that the quotes of two lines
were taken for a pair.
"""

import csv
import re
from collections.abc import Iterable, Iterator

from pipeline.data.layout import InvalidLine
from pipeline.errors import LogFileError

SEPARATORS = ("\t", "::", ",", ";")  # as detected: the first one that the first line contains
NONE_WORDS = {"(no genres listed)", "n/a", "nan", "none", "null", r"\n", "-"}  # in lower case; \N: of databases


class OpenQuoteError(InvalidLine):
    """A record in which a quoted cell begins and does not end."""


class CellSplitter:
    """Splits records into cells and strips them. With a separator of several characters no cell is quoted."""

    def __init__(self, separator: str) -> None:
        self.separator = separator
        self.has_quotes = len(separator) == 1 and separator != '"'
        self._blanks = " \t".replace(separator, "")
        self._has_tabs = separator != "\t"  # as blanks

    def split(self, record: str) -> list[str]:
        """Return the record's cells. InvalidLine; OpenQuoteError when a quoted cell does not end."""
        cells = self._split_quoted(record) if '"' in record and self.has_quotes else record.split(self.separator)
        if " " in record or (self._has_tabs and "\t" in record):
            return [cell.strip(self._blanks) for cell in cells]
        return cells

    def split_valid(self, records: Iterable[str]) -> Iterator[list[str]]:
        """Yield the cells of the records that can be split."""
        for record in records:
            try:
                yield self.split(record)
            except InvalidLine:
                continue

    def count(self, record: bytes) -> int | None:
        """Return the number of cells, 0 of an invalid record; None when the last one is quoted and not closed."""
        try:
            return len(self.split(record.decode("utf-8", "replace")))
        except OpenQuoteError:
            return None
        except InvalidLine:
            return 0

    def _split_quoted(self, record: str) -> list[str]:
        try:
            return self._read(record, strict=True)
        except csv.Error as error:
            if "end of data" in str(error):
                raise OpenQuoteError(f"a quoted cell is not closed in '{record[:60]}'") from error
            if "\n" in record:
                raise InvalidLine(f"not delimited text: {error}") from error
        try:
            return self._read(record, strict=False)  # text after a closing quote
        except csv.Error as error:
            raise InvalidLine(f"not delimited text: {error}") from error

    def _read(self, record: str, strict: bool) -> list[str]:
        return next(csv.reader([record], delimiter=self.separator, skipinitialspace=True, strict=strict))


def quoted(text: str) -> str:
    """Return the cell that is read as this text, which neither begins nor ends with a blank.

    A cell that begins with a quote is quoted, and so is one that at the start of a line would lose a byte order mark.
    """
    return '"' + text.replace('"', '""') + '"' if text.startswith(('"', "\ufeff")) else text


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
