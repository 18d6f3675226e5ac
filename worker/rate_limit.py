"""Log lines of a fault that may come with every record: a few are written, the others counted."""

from collections.abc import Callable

INTERVAL_S = 60.0  # a lasting fault stays visible in the log and does not fill it


class RateLimit:
    """Lets one line per `interval_s` through. monotonic: Clock.monotonic"""

    def __init__(self, monotonic: Callable[[], float], interval_s: float = INTERVAL_S) -> None:
        self._monotonic = monotonic
        self._interval_s = interval_s
        self._next_s = float("-inf")
        self._held_back = 0

    def admit(self) -> int | None:
        """Return the number of lines held back since the last one, or None to hold this one back, too."""
        now_s = self._monotonic()
        if now_s < self._next_s:
            self._held_back += 1
            return None
        self._next_s = now_s + self._interval_s
        held_back = self._held_back
        self._held_back = 0
        return held_back
