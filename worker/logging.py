"""Structured logs on stderr: JSON lines for machines, coloured lines for people."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from worker.config import LogConfig


def configure(config: LogConfig) -> None:
    """Route structlog and the standard library (aiokafka, redis) through one renderer."""
    shared = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if config.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a later command in the same process may have another level
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=renderer,
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, structlog.stdlib.ExtraAdder()],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    # aiokafka's heartbeats and fetches at info are noise; its warnings (rebalances, retries) are not.
    logging.getLogger("aiokafka").setLevel(max(logging.WARNING, root.level))


def get(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger whose lines carry `component: name`."""
    return structlog.get_logger(component=name)


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Silence one logger of the standard library while the body runs; its child loggers still write."""
    logger = logging.getLogger(name)

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)
