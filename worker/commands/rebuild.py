"""Restore the users' rings in Redis from the events topic.

Reads each partition from its beginning to the consumer group's committed offset and pushes the events that the rings
lack. Rings that Redis still holds whole are kept, with events that the topic no longer has. No slates are sent. Stop
the workers first; start them again afterwards. An interrupted run can be repeated.

example:
  millrace rebuild --config millrace.toml
"""

from argparse import ArgumentParser, Namespace

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="run even while the consumer group has members; pushes of those that are alive may be lost",
    )
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    from msgspec.structs import replace
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from worker import config_file, logging
    from worker.clock import WallClock
    from worker.kafka.client import cli_timeouts
    from worker.operations.rebuild import Rebuild, RebuildPlan, RebuildReport
    from worker.redis.client import connect

    async def rebuild(progress: Progress) -> tuple[RebuildPlan, RebuildReport]:
        client = await connect(loaded.redis, loaded.key_prefix)
        task = progress.add_task("rebuilding", total=None)
        try:
            work = Rebuild(replace(loaded, kafka=cli_timeouts(loaded.kafka)), client, WallClock())
            return await work.run(
                args.force, lambda offsets, total: progress.update(task, completed=offsets, total=total)
            )
        finally:
            await client.aclose()

    loaded = config_file.load(args.config)
    logging.configure(loaded.log)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        plan, report = asyncio.run(rebuild(progress))
    print(
        f"{report.restored} events restored: {report.events} of {report.users} users in {len(plan.ranges)} partitions "
        f"read, {report.rewritten} rings with gaps rewritten"
    )
    if report.unreadable:
        print(f"{report.unreadable} invalid records skipped: the workers dead-lettered them when they first read them")
    if report.corrupt:
        print(f"{report.corrupt} records of batches that cannot be decoded skipped; the log says where")
    if plan.lost:
        print(
            f"{plan.lost} older records are no longer in the topic: only rings that still hold their events have them"
        )
    if report.lost:
        print(f"{report.lost} records were deleted by retention before they were read")
    return 0
