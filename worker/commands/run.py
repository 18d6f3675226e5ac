"""Consume events from Kafka and answer them with slates, until SIGTERM or SIGINT.

The first signal drains the worker: admitted events are answered and committed, exit 0; what is not within
health.drain_timeout_s is read again by the next owner of the partitions, exit 9. The second exits at once (128 +
signal).

example:
  MILLRACE__KAFKA__BOOTSTRAP_SERVERS=broker:9092 millrace run --config millrace.toml
"""

import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    add_config(parser)


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

    from worker import config_file, logging, malloc_tuning
    from worker.errors import MillraceError
    from worker.process import Process

    loaded = config_file.load(args.config)
    logging.configure(loaded.log)
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
