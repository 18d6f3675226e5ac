"""Merges of counts into their rows in Redis, each exactly once.

Replies are taken one by one: a row that Redis refuses does not touch the others. Merges whose replies never came (a
time-out, a lost connection) may have been carried out or not: they are in doubt, and are sent again as they were. Each
carries a mark, the process and the merge's number, by which the row tells a repetition (counters.lua).
"""

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.records import DAY_MS
from worker.config import CountersConfig
from worker.errors import StoreError
from worker.redis.client import Command, RedisClient
from worker.redis.counters.counter_index import CounterIndex, OnInvalid
from worker.redis.functions import COUNT

TTL_HALF_LIVES = 12  # a row that was not touched for so long has lost all but 1/4096 of its weight: it expires
WRITER_BYTES = 4


class RowMerge(NamedTuple):
    """One item's counts on their way to its row."""

    item_id: str
    command: Command


class CounterMerger:
    """Sends merges. latest_ms: returns the latest time that a row may be of."""

    def __init__(
        self,
        client: RedisClient,
        config: CountersConfig,
        index: CounterIndex,
        latest_ms: Callable[[], int],
        on_invalid: OnInvalid,
    ) -> None:
        self._client = client
        self._index = index
        self._latest_ms = latest_ms
        self._on_invalid = on_invalid
        half_life_ms = config.half_life_days * DAY_MS
        self._half_life_ms = repr(half_life_ms)
        self._neighbours = config.neighbours
        self._ttl_s = int(TTL_HALF_LIVES * half_life_ms / 1000) + 1
        self._writer = secrets.token_bytes(WRITER_BYTES)
        self._merge_count = 0
        self._in_doubt: Sequence[RowMerge] = ()

    def next_mark(self) -> bytes:
        """Return the mark of the next merge; each row takes part in it once."""
        self._merge_count += 1
        return self._writer + self._merge_count.to_bytes(4, "little")

    def row_merge(
        self, item_id: str, as_of_ms: int, popularity: float, pairs: bytes, mark: bytes, condition: str = ""
    ) -> RowMerge:
        """Return the merge of an item's counts. condition: "absent" to count only when there is no row yet"""
        command = (
            "FCALL",
            COUNT.function,
            1,
            self._client.keys.counts(item_id),
            as_of_ms,
            self._half_life_ms,
            self._neighbours,
            self._ttl_s,
            repr(popularity),
            pairs,
            condition,
            self._latest_ms(),
            mark,
        )
        return RowMerge(item_id, command)

    async def settle(self) -> dict[str, bytes]:
        """Send the merges in doubt again, and return their rows by item. StoreUnavailable while one is in doubt."""
        merges = self._in_doubt
        rows = await self.send(merges) if merges else []
        replies = list(zip(merges, rows, strict=True))
        refused = [(merge, row) for merge, row in replies if isinstance(row, StoreError) and row.retriable]
        self._in_doubt = [merge for merge, _ in refused]
        for _, error in refused:
            raise error
        return {merge.item_id: row for merge, row in replies if not isinstance(row, StoreError)}

    async def send(self, merges: Sequence[RowMerge]) -> list[bytes | StoreError]:
        """Return each row as merged, or the error with which Redis refused it; items are added to the index.

        A row that can never be merged is reported. When this raises, or is cancelled, the merges are in doubt: settle
        them before any others.
        """
        additions = self._index.additions(merge.item_id for merge in merges)
        self._in_doubt = merges
        replies = await self._client.replies([*(merge.command for merge in merges), *(each for _, each in additions)])
        self._in_doubt = ()
        for (item_id, _), reply in zip(additions, replies[len(merges) :], strict=True):
            self._index.added(item_id, reply)
        rows = replies[: len(merges)]
        for merge, row in zip(merges, rows, strict=True):
            if isinstance(row, StoreError) and not row.retriable:
                self._on_invalid(self._client.keys.counts(merge.item_id), row)
        return rows
