"""The time by which a process that is ending must have ended."""

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from worker.interfaces import Clock


@dataclass(slots=True)
class Deadline:
    """Shared by all steps of the way out. Unset while the process runs: then only the steps' own limits hold."""

    clock: Clock
    at_s: float = math.inf  # Clock.monotonic()

    def start(self, timeout_s: float) -> None:
        """Set the deadline. Only the first call counts: no later step extends it."""
        if self.at_s == math.inf:
            self.at_s = self.clock.monotonic() + timeout_s

    def left_s(self, most_s: float = math.inf) -> float:
        """Return the seconds left, at most `most_s`."""
        return min(most_s, max(0.0, self.at_s - self.clock.monotonic()))

    def share_s(self, most_s: float = math.inf) -> float:
        """Return half of the seconds left, at most `most_s`: a step that hangs leaves time for those after it."""
        return min(most_s, self.left_s() / 2)

    async def finish(self, step: Coroutine[Any, Any, None], most_s: float) -> bool:
        """Wait for a step's share of the time; return whether it has succeeded. A late one is cancelled and left."""
        running = asyncio.create_task(step)
        _, late = await asyncio.wait({running}, timeout=self.share_s(most_s))
        if late:
            running.cancel()
        return not late and not running.cancelled() and running.exception() is None
