"""Tables on stdout: no cell is truncated, and in a file or a pipe each row stays on one line, for grep."""

import sys

from rich.console import Console, RenderableType
from rich.table import Table

PIPED_WIDTH = 1000


def table(*columns: str, title: str | None = None) -> Table:
    """Return a table without rows; long cells wrap."""
    empty = Table(title=title, title_justify="left", box=None)
    for column in columns:
        empty.add_column(column, overflow="fold")
    return empty


def print_tables(*tables: RenderableType) -> None:
    """Print without interpreting markup: texts of users and brokers may look like it."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False).print(*tables, sep="\n")
