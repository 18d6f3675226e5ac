"""Tables on stdout: no cell is truncated, and in a file or a pipe each row stays on one line, for grep."""

import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from worker.output.printable import printable

PIPED_WIDTH = 1000


class PrintableTable(Table):
    """A table that escapes control characters in its cells."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(*columns: str, title: str | None = None) -> Table:
    """Return a table without rows; long cells wrap."""
    empty = PrintableTable(title=title and printable(title), title_justify="left", box=None)
    for column in columns:
        empty.add_column(column, overflow="fold")
    return empty


def print_tables(*tables: RenderableType) -> None:
    """Print without interpreting markup: texts of users and brokers may look like it."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False).print(*tables, sep="\n")
