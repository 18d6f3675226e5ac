"""Structured logs on stderr: JSON lines for machines, coloured lines for people."""

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import structlog

from worker.config import LogConfig


def configure(config: LogConfig, worker: str | None = None) -> None:
    """Route structlog and the standard library (aiokafka, redis) through one renderer.

    worker: the process's number in its fleet, which every line then shows
    """

    def add_worker(logger: object, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return line if worker is None else {"worker": worker, **line}

    shared = [
        add_worker,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks as Python prints them: those with the frames' variables would show passwords and users' events.
    if config.format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(config.level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # a later command in the same process may have another level
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
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
