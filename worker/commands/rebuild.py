"""Restore the users' rings in Redis from the events topic.

Reads each partition from its beginning to the consumer group's committed offset, drops each user's old ring at their
first event, then pushes all their events. No slates are sent. Stop the workers first; start them again afterwards.

example:
  millrace rebuild --config millrace.toml
"""

from argparse import ArgumentParser, Namespace

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="run even while the consumer group has members")
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    from msgspec.structs import replace
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from worker import config, logging
    from worker.clock import WallClock
    from worker.kafka.client import cli_timeouts
    from worker.operations.rebuild import Rebuild, RebuildPlan, RebuildReport
    from worker.redis.client import connect

    async def rebuild(progress: Progress) -> tuple[RebuildPlan, RebuildReport]:
        client = await connect(loaded.redis)
        task = progress.add_task("rebuilding", total=None)
        try:
            work = Rebuild(replace(loaded, kafka=cli_timeouts(loaded.kafka)), client, WallClock())
            return await work.run(
                args.force, lambda report, total: progress.update(task, completed=report.offsets, total=total)
            )
        finally:
            await client.aclose()

    loaded = config.load(args.config)
    logging.configure(loaded.log)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        plan, report = asyncio.run(rebuild(progress))
    print(f"{len(report.users)} rings from {report.events} events of {len(plan.ranges)} partitions")
    if report.unreadable:
        print(f"{report.unreadable} invalid records skipped: the workers dead-lettered them when they first read them")
    if plan.lost:
        print(f"{plan.lost} older records are no longer in the topic: their events cannot be restored")
    return 0
