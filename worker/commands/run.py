"""Consume events from Kafka and answer them with slates, until SIGTERM or SIGINT.

The first signal drains the worker: admitted events are answered and committed, exit 0; what is not within
health.drain_timeout_s is read again by the next owner of the partitions, exit 9. The second exits at once (128 +
signal).

With --workers, this process supervises so many workers, members of the consumer group each: one that ends is started
again, and /livez, /readyz and /metrics of health.port are those of all.

examples:
  MILLRACE__KAFKA__BOOTSTRAP_SERVERS=broker:9092 millrace run --config millrace.toml
  millrace run --config millrace.toml --workers 4
"""

import os
import signal
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=worker_count,
        metavar="N|auto",
        help="worker processes; auto: one per two cores, at most one per partition (default: this process alone)",
    )
    add_config(parser)


def worker_count(text: str) -> int | str:
    """Return a number of workers, or "auto". ArgumentTypeError."""
    if text == "auto":
        return text
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ArgumentTypeError(f"{text!r}: want a whole number from 1 on, or auto")
    return int(text)


def run(args: Namespace) -> int:
    with _stopped_by_signals():
        return _run(args)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let a signal end the process with exit code 0, until the worker handles signals itself."""

    def stop(*_: object) -> None:
        os.write(2, b"millrace run: stopped during the start, nothing was read\n")
        os._exit(0)

    previous = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _run(args: Namespace) -> int:
    import asyncio

    from worker import config_file, logging
    from worker.errors import MillraceError
    from worker.fleet.supervise import NUMBER_VARIABLE, run_fleet
    from worker.process import Process
    from worker.system import malloc_tuning

    loaded = config_file.load(args.config)
    logging.configure(loaded.log, os.environ.get(NUMBER_VARIABLE))
    if args.workers is not None:
        asyncio.run(run_fleet(loaded, None if args.workers == "auto" else args.workers, _member_arguments(args)))
        return 0
    malloc_tuning.trim_large_blocks()
    process = Process(loaded)
    process.guard.start()
    try:
        asyncio.run(process.run())
    except MillraceError as error:
        process.guard.exit_code = error.exit_code
        raise
    process.guard.exit_code = 0
    return 0


def _member_arguments(args: Namespace) -> list[str]:
    return [] if args.config is None else ["--config", str(args.config)]
