"""Log lines of a fault that may come with every record: a few are written, the others counted."""

from collections.abc import Callable

INTERVAL_S = 60.0  # a lasting fault stays visible in the log and does not fill it
MAX_LINES = 10  # a handful of bad records are all named


class RateLimit:
    """Lets `max_lines` lines through per `interval_s`. monotonic: Clock.monotonic"""

    def __init__(
        self, monotonic: Callable[[], float], max_lines: int = MAX_LINES, interval_s: float = INTERVAL_S
    ) -> None:
        self._monotonic = monotonic
        self._max_lines = max_lines
        self._interval_s = interval_s
        self._interval_end_s = float("-inf")
        self._lines = 0
        self._held_back = 0

    def admit(self) -> int | None:
        """Return the number of lines held back since the last one, or None to hold this one back, too."""
        now_s = self._monotonic()
        if now_s >= self._interval_end_s:
            self._interval_end_s = now_s + self._interval_s
            self._lines = 0
        self._lines += 1
        if self._lines > self._max_lines:
            self._held_back += 1
            return None
        held_back = self._held_back
        self._held_back = 0
        return held_back
