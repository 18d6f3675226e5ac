"""Retry idempotent writes until they succeed or fail permanently."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from worker import logging, metrics
from worker.backoff import Backoff
from worker.errors import MillraceError
from worker.stream.health import HealthState

log = logging.get("retry")
MAX_DELAY_S = 5.0  # a recovered server is noticed within seconds
T = TypeVar("T")


class Retry:
    """Backs off from `first_delay_s` to MAX_DELAY_S without end; meanwhile /readyz says why.

    Errors that are not retriable are raised: they halt the worker.
    """

    def __init__(self, first_delay_s: float, health: HealthState) -> None:
        self._backoff = Backoff(first_delay_s, MAX_DELAY_S)
        self._health = health

    async def __call__(self, write: Callable[[Sequence[T]], Awaitable[None]], values: Sequence[T]) -> None:
        """Call `write(values)` until it returns. It must be idempotent."""
        delays_s = self._backoff.delays()
        part = write.__qualname__
        while (error := await _attempt(write, values)) is not None:
            delay_s = next(delays_s)
            self._health.problems[part] = str(error)
            self._health.next_attempt_s = self._health.clock.monotonic() + delay_s
            metrics.RETRIES.labels(type(error).__name__).inc()
            log.warning("write failed, retrying", part=part, error=str(error), delay_s=delay_s)
            await asyncio.sleep(delay_s)
        self._health.problems.pop(part, None)


async def _attempt(write: Callable[[Sequence[T]], Awaitable[None]], values: Sequence[T]) -> MillraceError | None:
    """Return a retriable error, or None when the write succeeded."""
    try:
        await write(values)
    except MillraceError as error:
        if not error.retriable:
            raise
        return error
    return None
