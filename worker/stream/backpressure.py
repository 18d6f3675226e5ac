"""Pause and resume the source by the number and the bytes of the events that the worker holds."""

from worker import metrics
from worker.config import BatcherConfig
from worker.interfaces import Source


class Backpressure:
    """Pauses at `max_pending_events` or `max_pending_mib`, whichever is reached first, and resumes at half of it.

    With a single mark, pauses would flap.
    """

    def __init__(self, config: BatcherConfig, source: Source) -> None:
        self._max_events = config.max_pending_events
        self._max_bytes = config.max_pending_mib << 20
        self._source = source

    def apply(self, events: int, held_bytes: int) -> None:
        """Pause or resume for what is held: events, and bytes of their records and rings."""
        load = max(events / self._max_events, held_bytes / self._max_bytes)
        if load >= 1:
            self._source.pause()
            metrics.PAUSED.set(1)
        elif load <= 0.5:
            self._source.resume()
            metrics.PAUSED.set(0)
