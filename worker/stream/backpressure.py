"""Pause and resume the source by the number of events that the worker holds."""

from worker import metrics
from worker.config import BatcherConfig
from worker.interfaces import Source


class Backpressure:
    """Pauses at `max_pending_events` and resumes at half of it: with a single mark, pauses would flap."""

    def __init__(self, config: BatcherConfig, source: Source) -> None:
        self._max_pending = config.max_pending_events
        self._source = source

    def apply(self, pending: int) -> None:
        if pending >= self._max_pending:
            self._source.pause()
            metrics.PAUSED.set(1)
        elif pending <= self._max_pending // 2:
            self._source.resume()
            metrics.PAUSED.set(0)
