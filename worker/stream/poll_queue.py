"""A queue between poll and ingest whose reader takes all waiting polls at once.

A trickle comes in many small polls. Pushed one by one, each waits for its own round trip to Redis and for the
pipeline's thread: at 1,000 events/s on two busy cores slates were 5 s late and later every second; taken at once,
0.2 s.
"""

import asyncio

from worker.interfaces import Partition, PolledRecords


class PollQueue:
    """Bounded by its writer, which pauses partitions. One task takes."""

    def __init__(self) -> None:
        self._waiting: list[list[PolledRecords]] = []
        self._closed = False
        self._changed = asyncio.Event()
        self.value_bytes = 0  # of the waiting records

    def put(self, polled: list[PolledRecords]) -> None:
        self._waiting.append(polled)
        self.value_bytes += _value_bytes(polled)
        self._changed.set()

    @property
    def record_count(self) -> int:
        return sum(len(records.records) for polled in self._waiting for records in polled)

    def drop(self, partition: Partition) -> None:
        """Drop the records of a partition that is no longer owned."""
        self._waiting = [[each for each in polled if each.partition != partition] for polled in self._waiting]
        self._waiting = [polled for polled in self._waiting if polled]
        self.value_bytes = sum(map(_value_bytes, self._waiting))

    def close(self) -> None:
        """Accept no more polls."""
        self._closed = True
        self._changed.set()

    async def take(self) -> list[list[PolledRecords]]:
        """Return all waiting polls in their order, at least one; empty only when closed."""
        while not (self._waiting or self._closed):
            self._changed.clear()
            await self._changed.wait()
        taken = self._waiting
        self._waiting = []
        self.value_bytes = 0
        return taken


def _value_bytes(polled: list[PolledRecords]) -> int:
    return sum(len(record.value or b"") for records in polled for record in records.records)
