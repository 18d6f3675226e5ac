"""Clocks: the machine's, and a virtual one that shows a recorded log's time."""

import time
from collections.abc import Callable
from datetime import UTC, datetime


def date_ms(text: str) -> int:
    """Return an ISO 8601 date or time, in UTC unless it has an offset, as milliseconds since 1970. ValueError."""
    date = datetime.fromisoformat(text)
    return int(1000 * (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())


class WallClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A log's time. Dates are the log's; durations (`monotonic`) stay real, so a replay measures real latencies.

    speed: log seconds per real second; None: the clock stands still between calls of `advance_to` (`--speed max`)
    """

    def __init__(self, speed: float | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.speed = speed
        self._monotonic = monotonic
        self._set_ms: int | None = None  # the time it was set to
        self._set_at_s = 0.0  # `monotonic` when it was set

    def now_ms(self) -> int:
        if self._set_ms is None:
            return 0
        if self.speed is None:
            return self._set_ms
        return self._set_ms + round((self._monotonic() - self._set_at_s) * 1000 * self.speed)

    def monotonic(self) -> float:
        return self._monotonic()

    def advance_to(self, ts_ms: int) -> None:
        """Set the clock, never back. A running clock is set only once, at the log's first event."""
        if self._set_ms is None or (self.speed is None and ts_ms > self._set_ms):
            self._set_ms = ts_ms
            self._set_at_s = self._monotonic()

    def wait_s(self, ts_ms: int) -> float:
        """Return the real seconds until the clock shows `ts_ms`; 0 if it does already, or does not run by itself."""
        if self.speed is None or self._set_ms is None:
            return 0.0
        return max(0.0, (ts_ms - self.now_ms()) / 1000 / self.speed)
