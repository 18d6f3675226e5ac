"""Delays between retries."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off: the first delay, doubled before each further retry, up to the cap; in seconds."""

    first_s: float
    cap_s: float

    def delays(self) -> Iterator[float]:
        """Yield the delays of one series of retries, without end."""
        delay_s = self.first_s
        while True:
            yield delay_s
            delay_s = min(2 * delay_s, self.cap_s)
