"""Print a user's slate from Redis, or the popular one for a user without a slate.

Exit status 44 when there is neither.

example:
  millrace lookup u1 --json | jq -r '.items[].item_id'
"""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from worker.commands.config import add_config

if TYPE_CHECKING:
    from pipeline.slates import Slate


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("user", help="user id, as in the events")
    parser.add_argument("--json", action="store_true", help="print one line of JSON (default: a table)")
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    import msgspec

    from worker import config_file
    from worker.lookup.lookup import Lookup

    async def find() -> "Slate":
        async with Lookup(config_file.load(args.config)) as lookup:
            return await lookup.slate(args.user)

    slate = asyncio.run(find())
    if args.json:
        print(msgspec.json.encode(slate).decode())
    else:
        _print_table(slate)
    return 0


def _print_table(slate: "Slate") -> None:
    from datetime import UTC, datetime

    from worker.output.tables import print_tables, table

    created = datetime.fromtimestamp(slate.created_ms / 1000, UTC).isoformat(" ", "seconds")
    strategy = f"{slate.strategy} on {slate.backend} ({slate.why})"
    title = f"{slate.user_id}: {strategy}, model {slate.model_version}, {created}"
    rows = table("", "item", "score", "engagement", "retention", "monetization", "source", title=title)
    for rank, item in enumerate(slate.items, 1):
        heads = [item.engagement, item.retention, item.monetization]
        cells = [f"{item.score:.4g}", *("" if head is None else f"{head:.3f}" for head in heads)]
        rows.add_row(str(rank), item.item_id, *cells, item.source)
    print_tables(rows)
