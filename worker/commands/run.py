"""Consume events from Kafka and answer them with slates, until SIGTERM or SIGINT.

The first signal drains the worker: admitted events are answered and committed, exit 0. The second exits at once (128 +
signal); the next owner of the partitions reads the rest again.

example:
  MILLRACE__KAFKA__BOOTSTRAP_SERVERS=broker:9092 millrace run --config millrace.toml
"""

from argparse import ArgumentParser, Namespace

from worker.commands.config import add_config


def configure(parser: ArgumentParser) -> None:
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    from worker import config, logging, malloc_tuning
    from worker.process import consume

    loaded = config.load(args.config)
    logging.configure(loaded.log)
    malloc_tuning.trim_large_blocks()
    asyncio.run(consume(loaded))
    return 0
