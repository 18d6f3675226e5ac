"""Run tasks beside the worker: one that fails is reported and started again, and the worker goes on serving.

A failure is logged with its traceback, counted in `millrace_background_failures_total`, and named by /readyz until the
task has run for `stable_s` again.
"""

import asyncio
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from worker import logging, metrics
from worker.backoff import Backoff
from worker.deadline import Deadline
from worker.errors import MillraceError
from worker.stream.health import HealthState

log = logging.get("supervisor")
Task = Callable[[], Awaitable[None]]
# A passing fault is over within seconds; a lasting one costs one attempt and one log line per minute.
RESTART_BACKOFF = Backoff(first_s=1.0, cap_s=60.0)
CANCEL_ATTEMPTS = 2
STABLE_S = 60.0  # as long as the longest delay: a task that fails once per delay never counts as mended


class Supervisor:
    """Keeps one process's background tasks running.

    stable_s: a task that has run for this long counts as mended, and its next delay is the first one again
    deadline: of the way out; without one, the tasks are waited for without a limit at the end
    """

    def __init__(
        self,
        health: HealthState,
        backoff: Backoff = RESTART_BACKOFF,
        stable_s: float = STABLE_S,
        deadline: Deadline | None = None,
    ) -> None:
        self._health = health
        self._deadline = deadline or Deadline(health.clock)
        self._backoff = backoff
        self._stable_s = stable_s

    @asynccontextmanager
    async def running(self, tasks: Mapping[str, Task]) -> AsyncIterator[None]:
        """Keep these tasks, by name, running while the body runs; cancel them at its end and wait for them.

        One that first finishes what it is at is cancelled again when its share of the time is over.
        """
        started = [asyncio.create_task(self._keep_running(name, run), name=name) for name, run in tasks.items()]
        try:
            yield
        finally:
            await self._cancel(started)
            for name in tasks:
                self._health.problems.pop(name, None)

    async def _cancel(self, tasks: Sequence[asyncio.Task]) -> None:
        for _ in range(CANCEL_ATTEMPTS):
            for task in tasks:
                task.cancel()
            left_s = self._deadline.share_s()
            _, late = await asyncio.wait(tasks, timeout=None if left_s == math.inf else left_s)
            if not late:
                return
            tasks = list(late)

    async def _keep_running(self, name: str, run: Task) -> None:
        delays_s = self._backoff.delays()
        while True:
            start_s = self._health.clock.monotonic()
            mended = asyncio.get_running_loop().call_later(self._stable_s, self._health.problems.pop, name, None)
            try:
                error = await _outcome(run)
            finally:
                mended.cancel()
            if self._health.clock.monotonic() - start_s >= self._stable_s:
                delays_s = self._backoff.delays()
            if _is_cancelled():
                self._report(name, error, restart_in_s=None)
                return
            delay_s = next(delays_s)
            self._report(name, error, delay_s)
            await asyncio.sleep(delay_s)

    def _report(self, name: str, error: BaseException, restart_in_s: float | None) -> None:
        is_expected = isinstance(error, MillraceError)  # its message says everything; any other error is a defect
        reason = str(error) if is_expected else repr(error)
        trace = {} if is_expected else {"traceback": "".join(traceback.format_exception(error))}
        self._health.problems[name] = reason
        metrics.BACKGROUND_FAILURES.labels(name).inc()
        log.error("background task failed", task=name, error=reason, restart_in_s=restart_in_s, **trace)


async def _outcome(run: Task) -> BaseException:
    """Run the task and return the error that ended it. Only the cancellation of this very task is raised."""
    try:
        await run()
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        return error  # something that the task awaited was cancelled
    except Exception as error:
        return error
    return RuntimeError("it returned, although it should run until it is cancelled")


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
