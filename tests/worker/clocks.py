"""Clocks for tests, which pass without waiting."""

from dataclasses import dataclass


@dataclass
class ManualClock:
    """Shows `now_s`, which the test moves."""

    now_s: float = 100.0

    def now_ms(self) -> int:
        return int(self.now_s * 1000)

    def monotonic(self) -> float:
        return self.now_s
