"""Tables for people: no cell is cut off, and in a file or a pipe a row stays on its line, for grep."""

import sys

from rich.console import Console, RenderableType
from rich.table import Table

PIPED_WIDTH = 1000


def table(*columns: str, title: str | None = None) -> Table:
    made = Table(title=title, title_justify="left", box=None)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_tables(*what: RenderableType) -> None:
    """On stdout. Text is taken as it is: what users and brokers say may look like markup."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, markup=False).print(*what)
