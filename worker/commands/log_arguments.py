"""Options of the commands that read a recorded log and its items, and functions that read them."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.output.printable import printable

if TYPE_CHECKING:
    from pipeline.data.event_log import EventLog
    from pipeline.data.log_io import LogLayout
    from pipeline.records import Item
    from worker.config import Config

LOG_HELP = "recorded log: JSON lines, MessagePack or delimited text, gzipped or not"
SHOWN_ACTIONS = 10


def add_log_layout(parser: ArgumentParser) -> None:
    """Add the options that describe delimited text, and the names of actions."""
    _add_columns(parser)
    parser.add_argument(
        "--unit",
        choices=("s", "ms", "us", "ns"),
        help="unit of numeric timestamps in delimited text (default: detected by their size)",
    )
    parser.add_argument("--action", help="action of every event when delimited text has no such column (default: rate)")
    parser.add_argument(
        "--map-actions",
        type=_pairs,
        default={},
        metavar="NAME=ACTION,…",
        help="the log's names of actions, such as addtocart=cart,transaction=purchase; added to events.action_aliases",
    )


def _add_columns(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        help="columns of delimited text by position: user,item[,action,ts,value,dwell]; - skips one; without ts an"
        " event's position in the log is its time",
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="column separator (default: tab, '::', comma or semicolon, detected)"
    )
    parser.add_argument(
        "--header",
        action=BooleanOptionalAction,
        help="whether the first line of delimited text names the columns (default: detected)",
    )


def add_items(parser: ArgumentParser) -> None:
    """Add --items."""
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="item records, gzipped or not: JSON lines as in the items topic, or text with a header line naming any of"
        " title, text, category, brand, price, created_ms, tags",
    )


def with_action_aliases(config: "Config", args: Namespace) -> "Config":
    """Return the configuration with the names of --map-actions. ConfigError for an action that does not exist."""
    from msgspec.structs import replace

    from worker.config import check_actions

    check_actions(config.events, args.map_actions.values(), "--map-actions")
    aliases = config.events.action_aliases | args.map_actions
    return replace(config, events=replace(config.events, action_aliases=aliases))


def read_records(args: Namespace) -> "list[Item]":
    """Read the item records of `args.items`, reporting unreadable ones on stderr; none without it.

    LogFileError when none can be read.
    """
    from pipeline.data.item_file import read_items

    if not args.items:
        return []
    file = read_items(args.items)
    if file.unreadable:
        left_out = _cannot_be_read(file.unreadable, file.first_error)
        _say(f"{args.items}: {left_out}; {_skipped(file.unreadable, len(file.items), 'item')}")
    return file.items


def log_layout(args: Namespace) -> "LogLayout":
    """Return the layout that the options describe. LogFileError for unknown column names."""
    from pipeline.data.log_io import LogLayout

    return LogLayout.parse(
        args.columns, action=args.action, separator=args.separator, unit=args.unit, header=args.header
    )


def say_recognised(args: Namespace, layout: "LogLayout") -> None:
    """Print what is recognised in the log's first lines on stderr."""
    from pipeline.data.log_io import recognised

    for sentence in recognised(args.log, layout):
        _say(f"{args.log}: {sentence}")


def read_events(args: Namespace, config: "Config") -> "EventLog":
    """Read `args.log`, reporting on stderr what is recognised and what is left out.

    LogFileError when it holds no event.
    """
    from pipeline.data.log_io import read_event_log
    from pipeline.errors import LogFileError

    layout = log_layout(args)
    say_recognised(args, layout)
    log = read_event_log(args.log, layout, config.schema, config.events.action_aliases)
    if not len(log):
        raise LogFileError(f"{args.log}: no event in it could be read: {_left_out(log) or 'it is empty'}")
    if log.unreadable:
        _say(f"{args.log}: {_left_out(log)}; {_skipped(log.unreadable, len(log), 'event')}")
    return log


def _left_out(log: "EventLog") -> str:
    """Return how many records were left out and why; empty when there are none."""
    if not log.unreadable:
        return ""
    counts = [f"{action} {count:,}" for action, count in log.unknown_actions.most_common(SHOWN_ACTIONS)]
    more = len(log.unknown_actions) - len(counts)
    actions = f"; by unknown actions: {', '.join(counts)}{f' and {more:,} more' if more else ''} (see --map-actions)"
    return f"{_cannot_be_read(log.unreadable, log.first_error)}{actions if counts else ''}"


def _cannot_be_read(count: int, first_error: str) -> str:
    if count == 1:
        return f"1 record cannot be read: {first_error}"
    return f"{count:,} records cannot be read, the first: {first_error}"


def _skipped(count: int, read: int, kind: str) -> str:
    skipped = "it is skipped" if count == 1 else "they are skipped"
    return f"{skipped}, 1 {kind} is read" if read == 1 else f"{skipped}, {read:,} {kind}s are read"


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and action.strip() for name, _, action in pairs):
        raise ArgumentTypeError(f"'{text}': want NAME=ACTION,…, such as addtocart=cart,transaction=purchase")
    actions = {name.strip(): action.strip() for name, _, action in pairs}
    if len(actions) < len(pairs):
        raise ArgumentTypeError(f"'{text}': names an action of the log twice")
    return actions


def _say(text: str) -> None:
    print(printable(text, keep="\n"), file=sys.stderr)
