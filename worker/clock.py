"""Time, as it is passed to whoever needs it: the wall's, or a recorded log's."""

import time
from collections.abc import Callable


class WallClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A log's time. Dates are the log's, durations (`monotonic`) stay real: a latency in a replay is a latency.

    `speed` log seconds pass in one real second; None: the clock stands where it was last put (`--speed max`).
    """

    def __init__(self, speed: float | None = None, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.speed, self._monotonic = speed, monotonic
        self._now_ms: int | None = None  # where it was put
        self._put_s = 0.0  # and when

    def now_ms(self) -> int:
        if self._now_ms is None:
            return 0
        if self.speed is None:
            return self._now_ms
        return self._now_ms + round((self._monotonic() - self._put_s) * 1000 * self.speed)

    def monotonic(self) -> float:
        return self._monotonic()

    def put(self, ts_ms: int) -> None:
        """Set the clock; one that runs is set once, at the log's first event. It never goes back."""
        if self._now_ms is None or (self.speed is None and ts_ms > self._now_ms):
            self._now_ms, self._put_s = ts_ms, self._monotonic()

    def wait_s(self, ts_ms: int) -> float:
        """Real seconds until the clock shows `ts_ms`; 0 when it does, or when it only stands where it is put."""
        if self.speed is None or self._now_ms is None:
            return 0.0
        return max(0.0, (ts_ms - self.now_ms()) / 1000 / self.speed)
