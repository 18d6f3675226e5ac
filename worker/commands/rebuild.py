"""Restore the users' rings in Redis from the events topic.

Reads each partition from its beginning to the consumer group's committed offset and pushes the events that the rings
lack. Rings that Redis still holds whole are kept, with events that the topic no longer has. No slates are sent. Stop
the workers first; start them again afterwards. An interrupted run can be repeated: no ring loses an event by it.
SIGTERM and SIGINT end it with 143 and 130. Memory: about 1 KB per user of the topic, and up to 1 GiB for rings with
gaps.

example:
  millrace rebuild --config millrace.toml
"""

import signal
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from worker.commands.config import add_config

if TYPE_CHECKING:
    from worker.operations.rebuild import RebuildPlan, RebuildReport


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
    from worker.operations.rebuild import Rebuild
    from worker.redis.client import connect
    from worker.stream.signals import handle_signals

    async def rebuild(progress: Progress) -> "tuple[RebuildPlan, RebuildReport]":
        running = asyncio.current_task()
        assert running is not None

        def stop(number: signal.Signals) -> None:
            stopped_by.append(number)
            running.cancel()

        handle_signals(stop)
        client = await connect(loaded.redis, loaded.key_prefix)
        task = progress.add_task("rebuilding", total=None)
        try:
            work = Rebuild(replace(loaded, kafka=cli_timeouts(loaded.kafka)), client, WallClock())
            return await work.run(
                args.force, lambda offsets, total: progress.update(task, completed=offsets, total=total)
            )
        finally:
            await client.aclose()

    stopped_by: list[signal.Signals] = []
    loaded = config_file.load(args.config)
    logging.configure(loaded.log)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            plan, report = asyncio.run(rebuild(progress))
        except asyncio.CancelledError:
            if not stopped_by:
                raise
            return _stopped(stopped_by[0])
    _print_report(plan, report)
    return 0


def _stopped(number: signal.Signals) -> int:
    print(
        f"millrace rebuild: stopped by {number.name} before all rings were restored; run rebuild "
        f"again before the workers start: no ring has lost an event, and those restored are kept",
        file=sys.stderr,
    )
    return 128 + number


def _print_report(plan: "RebuildPlan", report: "RebuildReport") -> None:
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
