"""List or requeue dead letters.

`ls` shows the newest letters. `requeue` sends records back to the topic and partition they came from, without
millrace's headers; what was sent is remembered on the broker, by the consumer group `<kafka.group_id>.requeue`, in the
same transaction: a second requeue sends none of them again (Kafka forgets it 7 days after the last requeue).

example:
  millrace dlq ls --limit 5
  millrace dlq requeue --reason "unknown action" --dry-run
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING

from worker.commands.arguments import positive
from worker.commands.config import add_config

if TYPE_CHECKING:
    from worker.operations.dead_letter_topic import DeadLetterRecord

SHOWN_CHARACTERS = 60


def configure(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls | requeue")

    def action(name: str, text: str, example: str) -> ArgumentParser:
        epilog = f"example:\n  millrace dlq {example}"
        return actions.add_parser(
            name, help=text, description=f"{text.capitalize()}.", epilog=epilog,
            formatter_class=RawDescriptionHelpFormatter,
        )  # fmt: skip

    ls = action("ls", "show the newest letters", "ls --limit 5 --json | jq -r .reason")
    ls.add_argument("--limit", type=positive, default=20, metavar="N", help="how many (default: 20)")
    requeue = action(
        "requeue", "send records back to where they came from", 'requeue --reason "unknown action" --dry-run'
    )
    requeue.add_argument("--reason", default="", metavar="TEXT", help="only letters whose reason contains it")
    requeue.add_argument("--limit", type=positive, metavar="N", help="at most so many, oldest first (default: all)")
    requeue.add_argument("--dry-run", action="store_true", help="show what would be sent")
    for each in (ls, requeue):
        each.add_argument("--json", action="store_true", help="JSON lines; keys and values in base64")
        add_config(each)


def run(args: Namespace) -> int:
    import asyncio

    from worker import config, logging
    from worker.kafka.client import cli_timeouts
    from worker.operations.dead_letter_topic import DeadLetterTopic, requeueable

    loaded = config.load(args.config)
    logging.configure(loaded.log)
    topic = DeadLetterTopic(cli_timeouts(loaded.kafka))
    if args.action == "ls":
        letters = asyncio.run(topic.read(args.limit))[-args.limit :]
    elif args.dry_run:
        letters = requeueable(asyncio.run(topic.read()), args.reason, args.limit)
    else:
        letters = asyncio.run(topic.requeue(args.reason, args.limit))
    _show(letters, args.json)
    if args.action == "requeue" and not args.json:
        would = "would be " if args.dry_run else ""
        print(f"{len(letters)} letter{'s' * (len(letters) != 1)} {would}requeued; position: group {topic.group}")
    return 0


def _show(letters: "list[DeadLetterRecord]", as_json: bool) -> None:
    import sys
    from datetime import UTC, datetime

    import msgspec

    from worker.commands.tables import print_tables, table

    if as_json:
        sys.stdout.write("".join(msgspec.json.encode(letter).decode() + "\n" for letter in letters))
        return
    rows = table("buried", "from", "key", "reason", "value", "requeued")
    rows.columns[0].no_wrap = rows.columns[1].no_wrap = True
    for letter in letters:
        buried = datetime.fromtimestamp(letter.ts_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
        origin, partition, offset = letter.origin
        rows.add_row(
            buried, f"{origin}-{partition}@{offset}", _text(letter.key), letter.reason, _text(letter.value),
            "yes" if letter.requeued else "cannot be" if letter.not_requeueable else "",
        )  # fmt: skip
    print_tables(rows)


def _text(content: bytes | None) -> str:
    if content is None:
        return "(none)"
    text = content[: 4 * SHOWN_CHARACTERS].decode("utf-8", "backslashreplace")
    return text[:SHOWN_CHARACTERS] + ("…" if len(text) > SHOWN_CHARACTERS else "")
