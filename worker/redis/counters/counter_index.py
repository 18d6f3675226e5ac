"""The index of the shared counters: sets of the items that have a row, so that a starting worker finds the rows without
a scan over all users' keys.
"""

from collections.abc import Callable, Collection, Iterable
from zlib import crc32

from worker.errors import StoreError
from worker.redis.client import Command, RedisClient

INDEX_SHARDS = 16  # at one per round every row is read again within 4 minutes
MAX_ID_CHARS = 256  # of an item id, as everywhere
OnInvalid = Callable[[str, object], None]  # called with a key and the reason why its content cannot be used


class CounterIndex:
    """The items that should be indexed, as far as this process knows.

    Redis may lose an addition, or all its data: whatever a shard then lacks is added again if its row exists.
    """

    def __init__(self, client: RedisClient, on_invalid: OnInvalid) -> None:
        self._client = client
        self._on_invalid = on_invalid
        self._shards: list[set[str]] = [set() for _ in range(INDEX_SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._shards[index_shard(item_id)]

    async def read(self, shard: int) -> tuple[list[str], list[str]]:
        """Return a shard's items in Redis, and those that it should have, too. StoreUnavailable."""
        key = self._client.keys.index(shard)
        [members] = await self._client.replies([("SMEMBERS", key)])
        if isinstance(members, StoreError):
            self._raise_or_report(key, members)
            members = []
        items = [item for member in members if (item := self._item(key, member)) is not None]
        missing = self._shards[shard].difference(items)
        self._shards[shard].update(items)
        return items, sorted(missing)

    async def update(
        self, shard: int, missing: Collection[str], stored: Collection[str], expired: Collection[str]
    ) -> None:
        """Add the missing items whose row was found, and remove the items without one. StoreUnavailable."""
        added = sorted(set(missing).intersection(stored))
        key = self._client.keys.index(shard)
        self._shards[shard].difference_update(expired)
        commands: list[Command] = [("SADD", key, *added)] if added else []
        commands += [("SREM", key, *expired)] if expired else []
        for reply in await self._client.replies(commands):
            if isinstance(reply, StoreError):
                self._raise_or_report(key, reply)

    def additions(self, items: Iterable[str]) -> list[tuple[str, Command]]:
        """Return the items that the index lacks, each with the command that adds it."""
        return [
            (item, ("SADD", self._client.keys.index(index_shard(item)), item)) for item in items if item not in self
        ]

    def added(self, item: str, reply: object) -> None:
        """Remember an addition after its reply. One that Redis refused is missing when its shard is read again."""
        self._shards[index_shard(item)].add(item)
        if isinstance(reply, StoreError) and not reply.retriable:
            self._on_invalid(self._client.keys.index(index_shard(item)), reply)

    def _item(self, key: str, member: bytes) -> str | None:
        try:
            item = member.decode()
        except UnicodeDecodeError as error:
            self._on_invalid(key, f"member {member[:MAX_ID_CHARS]!r}: {error}")
            return None
        if not 0 < len(item) <= MAX_ID_CHARS:
            self._on_invalid(key, f"member of {len(item)} characters, want 1 to {MAX_ID_CHARS}")
            return None
        return item

    def _raise_or_report(self, key: str, error: StoreError) -> None:
        if error.retriable:
            raise error
        self._on_invalid(key, error)


def index_shard(item_id: str) -> int:
    return crc32(item_id.encode()) % INDEX_SHARDS
