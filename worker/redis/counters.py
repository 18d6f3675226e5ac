"""Counters that all workers share: each sends what it counted to Redis and takes the merged rows back.

`cnt:{i:<item>}` is an item's row (counters.lua); `cnt:index:<shard>` are sets of the items that have one, so that a
start finds the rows without a scan over all users' keys. Every round also reads one shard anew, and with it the items
that others count and we do not. A failure costs nothing but time: what was not merged is sent in the next round.
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
from pipeline.records import DAY_MS, Covers, Latency, Slate, SlateItem
from worker import logging
from worker.config import Config
from worker.errors import StoreError
from worker.redis.client import Command, RedisClient
from worker.redis.counter_rows import pack_rows, rows_as_deltas, unpack_rows
from worker.redis.slates import SlateStore

log = logging.get("counters")
INDEX_SHARDS = 16  # of the index: at one a round every row is read again within 4 minutes
MERGED_ROWS = 32  # in one pipeline: so long Redis is kept from the rings' pushes, 3 ms
KEPT_FREE = 8  # an eighth of the vocabulary: the index's dead items must not come back for those retired
READ_ROWS = 512  # in one pipeline, and replaced at once: so long the counters' thread is kept from ranking, 3 ms
ROW_HALF_LIVES = 12  # a row that nobody touched for so long has lost all but 1/4096 of its weight: it expires
T = TypeVar("T")
RunInThread = Callable[[Callable[[], Any]], Awaitable[Any]]
PinItems = Callable[[], AbstractAsyncContextManager[Any]]


class CounterStore:
    """`within` runs a function in the thread that owns the counters; inside of `holding` no token loses its item, which
    a round needs. Make it before they observe anything: what they hold then comes from the artifact, and is shared with
    those items that have no row yet."""

    def __init__(
        self,
        client: RedisClient,
        config: Config,
        counters: Counters,
        run_in_thread: RunInThread,
        pin_items: PinItems = nullcontext,
        version: Callable[[], str] = lambda: "none",
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._client, self._config, self._version, self._now_ms = client, config, version, now_ms
        self._run_in_thread, self._pin_items = run_in_thread, pin_items
        self._counters, self._vocabulary = counters, counters.vocabulary
        self._slates = SlateStore(client, config.slates)
        self._shared_items: set[str] = set()
        self._failing = False
        self._round = 0
        half_life_ms = config.counters.half_life_days * DAY_MS
        ttl_s = int(ROW_HALF_LIVES * half_life_ms / 1000) + 1
        self._settings = repr(half_life_ms), config.counters.neighbours, ttl_s
        self._base: CountDeltas | None = rows_as_deltas(
            counters.rows(counters.counted()), counters.newest_ms
        )  # until loaded
        self._base_version = self._vocabulary.version
        counters.log = DeltaLog()

    async def run(self) -> None:
        """Merges every `counters.merge_interval_s` until it is cancelled, and then once more.

        No round is cut short: what Redis has added without our knowing would be sent again.
        """
        merging = asyncio.create_task(self.merge(), name="merge")
        try:
            while True:
                await asyncio.shield(merging)
                await asyncio.sleep(self._config.counters.merge_interval_s)
                merging = asyncio.create_task(self.merge(), name="merge")
        finally:
            await merging
            await self.merge()

    async def merge(self) -> bool:
        """One round, the first one loads. False when Redis failed it: said once, made up for in the next one."""
        try:
            async with self._pin_items():
                await self._merge()
        except StoreError as error:
            if not self._failing:
                log.warning("counters are not merged; they go on in this process alone", error=str(error))
            self._failing = True
            return False
        self._failing = False
        self._round += 1
        return True

    async def _merge(self) -> None:
        if self._base is not None:
            await self._load(self._base.without(self._vocabulary.evicted_since(self._base_version)))
            self._base = None
        touched = await self._send_deltas()
        await self._refresh(self._round % INDEX_SHARDS, touched)
        await self._write_popular()

    async def _load(self, base: CountDeltas) -> None:
        """Take over all rows; an item that only the artifact has counted gets its row from there."""
        members = [await self._members(shard) for shard in range(INDEX_SHARDS)]  # all first: a row names items of any shard
        for shard, ids in enumerate(members):
            await self._read(shard, ids)
        ids = self._vocabulary.item_ids
        own = base.select(
            np.array([token for token in base.items.tolist() if ids[token] not in self._shared_items], np.int32)
        )
        log.info("counters loaded", shared=len(self._shared_items), from_artifact=len(own.items))
        await self._merge_rows(own, [], "absent")

    async def _send_deltas(self) -> set[int]:
        """The tokens whose rows were merged."""
        raw = await self._run_in_thread(self._counters.take_deltas)
        # In another thread: sums what 8 k events/s leave in 15 s (2.4 M pairs) in 0.6 s, mostly without Python's lock.
        deltas: CountDeltas = await asyncio.to_thread(raw.summed, self._config.counters.neighbours)
        merged: list[int] = []
        try:
            await self._merge_rows(deltas, merged)
        except BaseException:
            left = deltas.select(np.setdiff1d(deltas.touched(), merged))
            await self._run_in_thread(lambda: self._counters.put_back(left))
            raise
        return set(merged)

    async def _merge_rows(self, deltas: CountDeltas, merged: list[int], *options: str) -> None:
        """Add to the rows in Redis and take the sums back; `merged` tells how far Redis has come."""
        half_life_ms, neighbours, ttl_s = self._settings
        rows, values = pack_rows(deltas, self._vocabulary.hashes), []
        while part := list(islice(rows, MERGED_ROWS)):
            ids = [self._vocabulary.item_ids[token] for token, _, _ in part]
            commands: list[Command] = [
                ("FCALL", "millrace_count", 1, row_key(item_id), deltas.as_of_ms, half_life_ms, neighbours, ttl_s,
                 repr(popularity), pairs, *options)
                for item_id, (_, popularity, pairs) in zip(ids, part, strict=True)
            ]  # fmt: skip
            new = [item_id for item_id in ids if item_id not in self._shared_items]
            commands += [("SADD", index_key(index_shard(item_id)), item_id) for item_id in new]
            values += (await self._client.pipeline(commands))[: len(part)]
            merged += [token for token, _, _ in part]
            self._shared_items.update(new)
            if len(values) >= READ_ROWS:
                await self._replace_rows(merged[-len(values) :], values)
                values = []
        await self._replace_rows(merged[len(merged) - len(values) :], values)

    async def _refresh(self, shard: int, merged: set[int]) -> None:
        ids = await self._members(shard)
        await self._read(shard, [item_id for item_id in ids if self._vocabulary.token(item_id) not in merged])

    async def _members(self, shard: int) -> list[str]:
        """The items of a shard of the index; they get tokens while there is plenty of room."""
        ids = [member.decode() for member in await self._client.call("SMEMBERS", index_key(shard))]
        await self._run_in_thread(lambda: self._admit(ids))
        self._shared_items.update(ids)
        return ids

    def _admit(self, ids: Sequence[str]) -> None:
        room = max(0, self._vocabulary.free_slots - self._vocabulary.max_items // KEPT_FREE)
        self._vocabulary.admit([item_id for item_id in ids if not self._vocabulary.token(item_id)][:room])

    async def _read(self, shard: int, ids: Sequence[str]) -> None:
        """Take over the rows of these items; forget those that have expired."""
        for part in _chunks(ids):
            values = await self._client.pipeline([("GET", row_key(item_id)) for item_id in part])
            there = [item_id for item_id, value in zip(part, values, strict=True) if value]
            gone = [item_id for item_id, value in zip(part, values, strict=True) if not value]
            await self._replace_rows(
                [self._vocabulary.token(item_id) for item_id in there], [value for value in values if value]
            )
            if gone:
                await self._client.call("SREM", index_key(shard), *gone)
                self._shared_items.difference_update(gone)

    async def _replace_rows(self, tokens: Sequence[int], values: Sequence[bytes]) -> None:
        rows = unpack_rows(tokens, values, self._vocabulary, self._config.counters.neighbours)
        await self._run_in_thread(lambda: self._counters.replace_rows(rows))

    async def _write_popular(self) -> None:
        """The answer for users without a slate."""
        tokens, shares = await self._run_in_thread(lambda: self._counters.popular(self._config.pipeline.slate_size))
        as_of_ms, ids = self._counters.newest_ms, self._vocabulary.item_ids
        items = [
            SlateItem(ids[token], round(share, 5), None, None, None, "popular")
            for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
        ]
        if items:
            covers = Covers(self._config.kafka.events_topic, -1, -1, -1, 0, as_of_ms)
            slate = Slate("", items, "popular", self._version(), covers, self._now_ms(), Latency())
            await self._slates.put_popular(slate, as_of_ms)


def row_key(item_id: str) -> str:
    return f"cnt:{{i:{item_id}}}"


def index_key(shard: int) -> str:
    return f"cnt:index:{shard}"


def index_shard(item_id: str) -> int:
    return crc32(item_id.encode()) % INDEX_SHARDS


def _chunks(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + READ_ROWS] for start in range(0, len(values), READ_ROWS))
