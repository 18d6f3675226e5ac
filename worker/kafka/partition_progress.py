"""Tell how far each partition has been read, and since when one stands still although records wait in it.

The broker is asked for the partitions' ends apart from fetching: a fetch that hangs reports no ends either.
"""

from collections.abc import Mapping

from worker.interfaces import Clock, Partition


class PartitionProgress:
    """Positions against ends, of one member's partitions."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._positions: dict[Partition, int] = {}
        self._ends: dict[Partition, int] = {}
        self._moved_s: dict[Partition, float] = {}  # Clock.monotonic() when it last moved, or nothing waited in it

    def update(self, positions: Mapping[Partition, int], ends: Mapping[Partition, int], paused: bool) -> None:
        """Take over the next offsets to read and the ends of all owned partitions.

        paused: nothing is read on purpose, which is no standstill
        """
        now_s = self._clock.monotonic()
        self._moved_s = {
            partition: self._moved_s.get(partition, now_s)
            if ends.get(partition, 0) > position == self._positions.get(partition) and not paused
            else now_s
            for partition, position in positions.items()
        }
        self._positions = dict(positions)
        self._ends = dict(ends)

    def end(self, partition: Partition) -> int:
        """Return the end that the broker told last, 0 before."""
        return self._ends.get(partition, 0)

    def stalled_s(self) -> dict[Partition, float]:
        """Return for how long each partition has stood still although records wait in it."""
        now_s = self._clock.monotonic()
        return {
            partition: now_s - moved_s if self._ends.get(partition, 0) > self._positions[partition] else 0.0
            for partition, moved_s in self._moved_s.items()
        }
