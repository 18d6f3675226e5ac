"""Between poll and ingest: what was polled, taken all at once however many polls it came in.

A trickle comes in many small polls. Pushed one by one, each waits for its own answer of Redis and for the pipeline's
thread: at 1,000 events/s on two busy cores slates were 5 s late and later every second; taken at once, 0.2 s.
"""

import asyncio

from worker.interfaces import Fetched


class Polled:
    """Bounded by who puts: the loop pauses partitions. One task takes."""

    def __init__(self) -> None:
        self._waiting: list[list[Fetched]] = []
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, fetched: list[Fetched]) -> None:
        self._waiting.append(fetched)
        self._changed.set()

    def close(self) -> None:
        """Nothing comes any more."""
        self._closed = True
        self._changed.set()

    async def take(self) -> list[list[Fetched]]:
        """All polls that wait, in their order, at least one; empty only when it is closed."""
        while not (self._waiting or self._closed):
            self._changed.clear()
            await self._changed.wait()
        taken, self._waiting = self._waiting, []
        return taken
