"""Counters that all workers share: each sends its deltas to Redis and reads the merged rows back.

`cnt:{i:<item>}` is an item's row (counters.lua); `cnt:index:<shard>` are sets of the items that have one, so that a
starting worker finds the rows without a scan over all users' keys. Every round also reads one shard again, and with it
the items that only other workers count. Failures are safe: unmerged counts are sent in the next round.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar
from zlib import crc32

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.counters.deltas import CountDeltas, DeltaLog
from pipeline.records import DAY_MS
from pipeline.slates import Covers, Latency, Slate, SlateItem
from pipeline.strategies.simple_strategy import SimpleStrategy
from worker import logging
from worker.config import Config
from worker.errors import StoreError
from worker.redis.client import Command, RedisClient
from worker.redis.counter_rows import pack_rows, rows_as_deltas, unpack_rows
from worker.redis.slates import SlateStore

log = logging.get("counters")
INDEX_SHARDS = 16  # at one per round every row is read again within 4 minutes
MERGE_BATCH_ROWS = 32  # per pipeline: one keeps Redis from the rings' pushes for 3 ms
READ_BATCH_ROWS = 512  # per pipeline and replacement: one keeps the pipeline's thread from ranking for 3 ms
MIN_FREE_FRACTION = 1 / 8  # of the vocabulary: indexed but inactive items must not replace those that were evicted
TTL_HALF_LIVES = 12  # a row that was not touched for so long has lost all but 1/4096 of its weight: it expires
T = TypeVar("T")
RunInThread = Callable[[Callable[[], Any]], Awaitable[Any]]
PinItems = Callable[[], AbstractAsyncContextManager[Any]]


class CounterStore:
    """Merges one process's counters through Redis.

    Construct it before the counters observe anything: what they hold then comes from the artifact, and is shared for
    those items that have no row yet.
    """

    def __init__(
        self,
        client: RedisClient,
        config: Config,
        counters: Counters,
        slates: SlateStore,
        run_in_thread: RunInThread,
        pin_items: PinItems = nullcontext,
        version: Callable[[], str] = lambda: "none",
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Take over the artifact's counts.

        slates: writes the popular slate
        run_in_thread: runs a function in the thread that owns the counters
        pin_items: while its context is open no token loses its item, which a round needs
        version: returns the serving model's version, for the popular slate
        """
        self._client = client
        self._config = config
        self._counters = counters
        self._vocabulary = counters.vocabulary
        self._run_in_thread = run_in_thread
        self._pin_items = pin_items
        self._version = version
        self._now_ms = now_ms
        self._slates = slates
        self._shared_items: set[str] = set()
        self._failing = False
        self._round = 0
        half_life_ms = config.counters.half_life_days * DAY_MS
        self._half_life_ms = repr(half_life_ms)
        self._ttl_s = int(TTL_HALF_LIVES * half_life_ms / 1000) + 1
        artifact_rows = counters.rows(counters.counted())
        self._artifact_counts: CountDeltas | None = rows_as_deltas(artifact_rows, counters.newest_ms)  # until loaded
        self._artifact_vocabulary_version = self._vocabulary.version
        counters.log = DeltaLog()

    async def run(self) -> None:
        """Merge every `counters.merge_interval_s` until cancelled, and then once more.

        No round is interrupted, unless by a second cancel: counts that Redis had added without a reply would be sent
        again. Loading is interrupted, and then nothing is merged: it may take minutes, and what it sends changes
        nothing when it is sent again.
        """
        merging = asyncio.create_task(self.merge(), name="merge")
        try:
            while True:
                await asyncio.shield(merging)
                await asyncio.sleep(self._config.counters.merge_interval_s)
                merging = asyncio.create_task(self.merge(), name="merge")
        finally:
            if self._artifact_counts is not None:
                merging.cancel()
                await asyncio.wait({merging})
            else:
                await merging
                await self.merge()

    async def merge(self) -> bool:
        """Run one round; the first one loads. Return False when Redis failed: the next round catches up."""
        try:
            async with self._pin_items():
                await self._merge()
        except StoreError as error:
            if not self._failing:
                log.warning("counters not merged, this process continues with its own", error=str(error))
            self._failing = True
            return False
        self._failing = False
        self._round += 1
        return True

    async def _merge(self) -> None:
        if self._artifact_counts is not None:
            evicted = self._vocabulary.evicted_since(self._artifact_vocabulary_version)
            await self._load(self._artifact_counts.without(evicted))
            self._artifact_counts = None
        merged = await self._send_deltas()
        await self._refresh(self._round % INDEX_SHARDS, merged)
        await self._write_popular()

    async def _load(self, artifact_counts: CountDeltas) -> None:
        """Read all rows; an item that only the artifact has counted gets its row from there."""
        # All shards first: a row names items of any shard.
        shards = [await self._read_index(shard) for shard in range(INDEX_SHARDS)]
        for shard, shard_items in enumerate(shards):
            await self._read_rows(shard, shard_items)
        ids = self._vocabulary.item_ids
        unshared = [token for token in artifact_counts.items.tolist() if ids[token] not in self._shared_items]
        seeds = artifact_counts.select(np.array(unshared, np.int32))
        log.info("counters loaded", shared=len(self._shared_items), from_artifact=len(seeds.items))
        await self._merge_rows(seeds, [], "absent")

    async def _send_deltas(self) -> set[int]:
        """Return the tokens whose rows were merged."""
        raw = await self._run_in_thread(self._counters.take_deltas)
        # In another thread: sums what 8 k events/s leave in 15 s (2.4 M pairs) in 0.6 s, mostly without the GIL.
        deltas: CountDeltas = await asyncio.to_thread(raw.summed, self._config.counters.neighbours)
        merged: list[int] = []
        try:
            await self._merge_rows(deltas, merged)
        except BaseException:
            unsent = deltas.select(np.setdiff1d(deltas.touched(), merged))
            await self._run_in_thread(lambda: self._counters.put_back(unsent))
            raise
        return set(merged)

    async def _merge_rows(self, deltas: CountDeltas, merged: list[int], condition: str = "") -> None:
        """Add to the rows in Redis and read the sums back. Appends each token to `merged` once Redis has it."""
        rows = pack_rows(deltas, self._vocabulary.hashes)
        values: list[bytes] = []
        while batch := list(islice(rows, MERGE_BATCH_ROWS)):
            ids = [self._vocabulary.item_ids[token] for token, _, _ in batch]
            commands = [
                self._merge_command(item_id, deltas.as_of_ms, popularity, pairs, condition)
                for item_id, (_, popularity, pairs) in zip(ids, batch, strict=True)
            ]
            new_items = [item_id for item_id in ids if item_id not in self._shared_items]
            commands += [("SADD", index_key(index_shard(item_id)), item_id) for item_id in new_items]
            values += (await self._client.pipeline(commands))[: len(batch)]
            merged += [token for token, _, _ in batch]
            self._shared_items.update(new_items)
            if len(values) >= READ_BATCH_ROWS:
                await self._replace_rows(merged[-len(values) :], values)
                values = []
        await self._replace_rows(merged[len(merged) - len(values) :], values)

    def _merge_command(self, item_id: str, as_of_ms: int, popularity: float, pairs: bytes, condition: str) -> Command:
        return (
            "FCALL",
            "millrace_count",
            1,
            row_key(item_id),
            as_of_ms,
            self._half_life_ms,
            self._config.counters.neighbours,
            self._ttl_s,
            repr(popularity),
            pairs,
            condition,
            self._latest_ms(),
        )

    def _latest_ms(self) -> int:
        """Return the latest time that a row may be of: the stream accepts no event after it."""
        return max(self._now_ms() + int(1000 * self._config.events.max_clock_skew_s), self._counters.newest_ms)

    async def _refresh(self, shard: int, merged: set[int]) -> None:
        """Read a shard's rows again, except those that were just merged."""
        ids = await self._read_index(shard)
        tokens = self._vocabulary.tokens_of_ids(ids).tolist()
        unmerged = [item_id for item_id, token in zip(ids, tokens, strict=True) if token not in merged]
        await self._read_rows(shard, unmerged)

    async def _read_index(self, shard: int) -> list[str]:
        """Return the items of a shard of the index, admitted while the vocabulary has enough free slots."""
        ids = [member.decode() for member in await self._client.call("SMEMBERS", index_key(shard))]
        await self._run_in_thread(lambda: self._admit(ids))
        self._shared_items.update(ids)
        return ids

    def _admit(self, ids: Sequence[str]) -> None:
        reserved = int(self._vocabulary.max_items * MIN_FREE_FRACTION)
        free = max(0, self._vocabulary.free_slots - reserved)
        self._vocabulary.admit(self._vocabulary.unknown(ids)[:free])

    async def _read_rows(self, shard: int, ids: Sequence[str]) -> None:
        """Take over the rows of these items, and remove those that have expired from the index."""
        for batch in _batches(ids):
            values = await self._client.pipeline([("GET", row_key(item_id)) for item_id in batch])
            stored = {item_id: value for item_id, value in zip(batch, values, strict=True) if value}
            tokens = self._vocabulary.tokens_of_ids(list(stored)).tolist()
            await self._replace_rows(tokens, list(stored.values()))
            if expired := [item_id for item_id in batch if item_id not in stored]:
                await self._client.call("SREM", index_key(shard), *expired)
                self._shared_items.difference_update(expired)

    async def _replace_rows(self, tokens: Sequence[int], values: Sequence[bytes]) -> None:
        rows = unpack_rows(tokens, values, self._vocabulary, self._config.counters.neighbours)
        rows.as_of_ms = np.minimum(rows.as_of_ms, self._latest_ms())
        await self._run_in_thread(lambda: self._counters.replace_rows(rows))

    async def _write_popular(self) -> None:
        """Write the slate of users without one of their own."""
        slate_size = self._config.pipeline.slate_size
        tokens, scores = await self._run_in_thread(lambda: self._counters.popular(slate_size))
        as_of_ms = self._counters.newest_ms
        ids = self._vocabulary.item_ids
        items = [
            SlateItem(ids[token], round(score, 5), None, None, None, "popular")
            for token, score in zip(tokens.tolist(), scores.tolist(), strict=True)
        ]
        if items:
            covers = Covers(self._config.kafka.events_topic, -1, -1, -1, 0, as_of_ms)
            slate = Slate(
                user_id="",
                items=items,
                strategy="popular",
                backend=SimpleStrategy.backend,
                why="default",
                model_version=self._version(),
                covers=covers,
                created_ms=self._now_ms(),
                latency_ms=Latency(),
            )
            await self._slates.put_popular(slate, as_of_ms)


def row_key(item_id: str) -> str:
    return f"cnt:{{i:{item_id}}}"


def index_key(shard: int) -> str:
    return f"cnt:index:{shard}"


def index_shard(item_id: str) -> int:
    return crc32(item_id.encode()) % INDEX_SHARDS


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + READ_BATCH_ROWS] for start in range(0, len(values), READ_BATCH_ROWS))
