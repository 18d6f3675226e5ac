"""A cache of the most recently pushed rings of owned partitions, bounded in bytes."""

from collections import OrderedDict

from worker.interfaces import Partition
from worker.redis.rings.ring import Ring

# A Ring with its ints and 8-byte sources, the dictionary entry and the user id, without the events (sys.getsizeof).
ENTRY_BYTES = 600


class RingCache:
    """Evicts the least recently pushed rings beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.bytes = 0
        self._limit_bytes = limit_bytes
        self._rings: OrderedDict[str, tuple[Ring, Partition, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rings)

    def get(self, user_id: str) -> Ring | None:
        cached = self._rings.get(user_id)
        return cached and cached[0]

    def put(self, user_id: str, ring: Ring, partition: Partition) -> None:
        """Cache a ring under the partition that it was just pushed from."""
        size = ENTRY_BYTES + len(ring.events)
        old = self._rings.get(user_id)
        self.bytes += size - (old[2] if old else 0)
        self._rings[user_id] = ring, partition, size
        self._rings.move_to_end(user_id)
        while self.bytes > self._limit_bytes:
            self.bytes -= self._rings.popitem(last=False)[1][2]

    def forget(self, partition: Partition) -> None:
        """Drop the rings of a partition."""
        for user_id in [user_id for user_id, (_, owner, _) in self._rings.items() if owner == partition]:
            self.bytes -= self._rings.pop(user_id)[2]
