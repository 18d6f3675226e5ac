"""List or requeue dead letters.

`ls` shows the newest dead letters. `requeue` sends records back to the topic and partition they came from, without
millrace's headers. The same transaction stores on the broker which ones were sent, as offsets of the consumer group
`<kafka.group_id>.requeue`: a second requeue sends none of them again (Kafka forgets it 7 days after the last requeue).
Of several copies of a record one is sent. Records whose topic does not exist stay.

example:
  millrace dlq ls --limit 5
  millrace dlq requeue --reason "unknown action" --dry-run
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING

from worker.commands.arguments import positive
from worker.commands.config import add_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from worker.operations.dead_letter_topic import DeadLetterRecord, DeadLetterTopic

MAX_CELL_CHARACTERS = 60
TABLE_ROWS = 50  # per table of a dry run, which holds no more letters than one table shows


def configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls | requeue")

    def add_action(name: str, text: str, example: str) -> ArgumentParser:
        return actions.add_parser(
            name,
            help=text,
            description=f"{text.capitalize()}.",
            epilog=f"example:\n  millrace dlq {example}",
            formatter_class=RawDescriptionHelpFormatter,
        )

    ls = add_action("ls", "show the newest dead letters", "ls --limit 5 --json | jq -r .reason")
    ls.add_argument("--limit", type=positive, default=20, metavar="N", help="number of dead letters (default: 20)")
    requeue = add_action(
        "requeue", "send records back to where they came from", 'requeue --reason "unknown action" --dry-run'
    )
    requeue.add_argument(
        "--reason", default="", metavar="TEXT", help="text that a reason must contain (default: any reason)"
    )
    requeue.add_argument(
        "--limit", type=positive, metavar="N", help="largest number of records, oldest first (default: all)"
    )
    requeue.add_argument("--dry-run", action="store_true", help="show the records without sending them")
    for each in (ls, requeue):
        each.add_argument(
            "--json", action="store_true", help="print JSON lines, keys and values in base64 (default: a table)"
        )
        add_config(each)


def run(args: Namespace) -> int:
    import asyncio

    from worker import config_file, logging
    from worker.kafka.client import cli_timeouts
    from worker.operations.dead_letter_topic import DeadLetterTopic

    loaded = config_file.load(args.config)
    logging.configure(loaded.log)
    topic = DeadLetterTopic(cli_timeouts(loaded.kafka))
    if args.action == "ls":
        _show(asyncio.run(topic.read(args.limit))[-args.limit :], args.json)
    else:
        asyncio.run(_requeue(topic, args))
    return 0


async def _requeue(topic: "DeadLetterTopic", args: Namespace) -> None:
    """Requeue, or select for --dry-run, and show the letters as they come."""
    import sys

    from worker.operations.requeue import Requeue

    requeue = Requeue(topic, args.reason, args.limit)
    count = 0
    async for letters in _in_tables(requeue.select()) if args.dry_run else requeue.run():
        count += len(letters)
        if letters:
            _show(letters, args.json)
    if not args.json:
        would = "would be " if args.dry_run else ""
        print(f"{count} dead letter{'s' * (count != 1)} {would}requeued; position: group {topic.group}")
    for name, missing in sorted(requeue.missing.items()):
        print(f"{missing} stay: their topic {name} does not exist; create it and run again", file=sys.stderr)


async def _in_tables(letters: "AsyncIterator[DeadLetterRecord]") -> "AsyncIterator[list[DeadLetterRecord]]":
    """Yield lists of at most TABLE_ROWS letters."""
    rows: list[DeadLetterRecord] = []
    async for letter in letters:
        rows.append(letter)
        if len(rows) == TABLE_ROWS:
            yield rows
            rows = []
    yield rows


def _show(letters: "list[DeadLetterRecord]", as_json: bool) -> None:
    import sys
    from datetime import UTC, datetime

    import msgspec

    from worker.output.tables import print_tables, table

    if as_json:
        sys.stdout.write("".join(msgspec.json.encode(letter).decode() + "\n" for letter in letters))
        return
    rows = table("written", "from", "key", "reason", "value", "requeued")
    for column in rows.columns[:2]:
        column.no_wrap = True
    for letter in letters:
        topic, partition, offset = letter.origin
        rows.add_row(
            datetime.fromtimestamp(letter.ts_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds"),
            f"{topic}-{partition}@{offset}",
            _cell(letter.key),
            letter.reason,
            _cell(letter.value),
            "yes" if letter.requeued else "cannot be" if letter.not_requeueable else "",
        )
    print_tables(rows)


def _cell(content: bytes | None) -> str:
    if content is None:
        return "(none)"
    text = content[: 4 * MAX_CELL_CHARACTERS].decode("utf-8", "backslashreplace")
    return text[:MAX_CELL_CHARACTERS] + ("…" if len(text) > MAX_CELL_CHARACTERS else "")
