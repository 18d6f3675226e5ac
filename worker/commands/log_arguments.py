"""How to read a recorded log and its items: the options that commands share, and all of it as they want it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.data.event_log import Log
    from pipeline.data.log_io import Layout
    from pipeline.records import EventSchema, Item


def add_layout(parser: ArgumentParser) -> None:
    """How to read delimited text."""
    parser.add_argument(
        "--columns",
        help="of delimited text, by place: user,item[,action,ts,value,dwell]; - skips one; without ts the place in the"
        " log is the time",
    )
    parser.add_argument("--separator", metavar="TEXT", help="between columns (default: tab, '::' or comma)")
    parser.add_argument("--action", help="the action of every event, where the log has none (default: rate)")


def add_items(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--items", type=Path, metavar="FILE", help="items' records: JSON lines as the items topic holds them, or text"
        " with a header line; known are title, text, category, brand, price, created_ms, tags",
    )  # fmt: skip


def read_records(args: Namespace) -> "list[Item]":
    """All of `args.items`; none when it is not given. LogFileError when a record is none."""
    from pipeline.data.item_file import read_items

    return read_items(args.items) if args.items else []


def layout_of(args: Namespace) -> "Layout":
    """LogFileError for columns that mean nothing."""
    from pipeline.data.log_io import Layout

    return Layout.parse(args.columns, action=args.action, separator=args.separator)


def read_events(args: Namespace, schema: "EventSchema") -> "Log":
    """All of `args.log`; what cannot be read is left out and told. LogFileError when there is no event in it."""
    import sys

    from pipeline.data.log_io import read_columns
    from pipeline.errors import LogFileError

    log = read_columns(args.log, layout_of(args), schema)
    left_out = f"{log.unreadable:,} records cannot be read, the first: {log.why}" if log.unreadable else "it is empty"
    if not len(log):
        raise LogFileError(f"{args.log}: no event in it could be read: {left_out}")
    if log.unreadable:
        print(f"{args.log}: {left_out}; they are left out, {len(log):,} events are read", file=sys.stderr)
    return log
