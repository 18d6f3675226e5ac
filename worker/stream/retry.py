"""Writes that must happen: repeated until they do, unless repeating cannot help."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from worker import logging, metrics
from worker.errors import MillraceError
from worker.stream.health import Pulse

log = logging.get("retry")
CAP_S = 5.0  # of the back-off: a part that is back is noticed within seconds


class Retry:
    """Backs off from `first_s` to CAP_S without end; while it waits, /readyz says why. Errors that are not retriable
    are raised: they halt the worker."""

    def __init__(self, first_s: float, pulse: Pulse) -> None:
        self._first_s, self._pulse = first_s, pulse

    async def __call__(self, act: Callable[[Sequence], Awaitable[None]], what: Sequence) -> None:
        """`act(what)` until it returns. It must be idempotent."""
        delay_s, part = self._first_s, act.__qualname__
        while (error := await _attempt(act, what)) is not None:
            self._pulse.problems[part] = str(error)
            metrics.RETRIES.labels(type(error).__name__).inc()
            log.warning("retrying", part=part, error=str(error), delay_s=delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, CAP_S)
        self._pulse.problems.pop(part, None)


async def _attempt(act: Callable[[Sequence], Awaitable[None]], what: Sequence) -> MillraceError | None:
    try:
        await act(what)
    except MillraceError as error:
        if not error.retriable:
            raise
        return error
    return None
