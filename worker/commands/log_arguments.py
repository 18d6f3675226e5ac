"""Options of the commands that read a recorded log and its items, and functions that read them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.data.event_log import EventLog
    from pipeline.data.log_io import LogLayout
    from pipeline.records import EventSchema, Item

LOG_HELP = "recorded log: JSON lines, MessagePack or delimited text, gzipped or not"


def add_log_layout(parser: ArgumentParser) -> None:
    """Add the options that describe delimited text."""
    parser.add_argument(
        "--columns",
        help="columns of delimited text by position: user,item[,action,ts,value,dwell]; - skips one; without ts an"
        " event's position in the log is its time",
    )
    parser.add_argument("--separator", metavar="TEXT", help="column separator (default: tab, '::' or comma, detected)")
    parser.add_argument("--action", help="action of every event when the log has no such column (default: rate)")


def add_items(parser: ArgumentParser) -> None:
    """Add --items."""
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="item records: JSON lines as in the items topic, or text with a header line naming any of title, text,"
        " category, brand, price, created_ms, tags",
    )


def read_records(args: Namespace) -> "list[Item]":
    """Read the item records of `args.items`; none without it. LogFileError for an invalid record."""
    from pipeline.data.item_file import read_items

    return read_items(args.items) if args.items else []


def log_layout(args: Namespace) -> "LogLayout":
    """Return the layout that the options describe. LogFileError for unknown column names."""
    from pipeline.data.log_io import LogLayout

    return LogLayout.parse(args.columns, action=args.action, separator=args.separator)


def read_events(args: Namespace, schema: "EventSchema") -> "EventLog":
    """Read `args.log`, reporting unreadable records on stderr. LogFileError when it holds no event."""
    import sys

    from pipeline.data.log_io import read_event_log
    from pipeline.errors import LogFileError

    log = read_event_log(args.log, log_layout(args), schema)
    reason = (
        f"{log.unreadable:,} records cannot be read, the first: {log.first_error}" if log.unreadable else "it is empty"
    )
    if not len(log):
        raise LogFileError(f"{args.log}: no event in it could be read: {reason}")
    if log.unreadable:
        print(f"{args.log}: {reason}; they are skipped, {len(log):,} events are read", file=sys.stderr)
    return log
