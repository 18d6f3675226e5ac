"""Counters that all workers share: each sends its deltas to Redis and reads the merged rows back.

`cnt:{i:<item>}` is an item's row (counters.lua), `cnt:index:<shard>` the index of the rows (counter_index.py). Every
round merges what was counted since the last one (counter_merger.py), then reads one shard again, and with it the items
that only other workers count. Failures are safe: unmerged counts are sent in the next round. A row or an index member
that cannot be used is skipped, counted and logged.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.counters.deltas import CountDeltas, DeltaLog
from worker import logging, metrics
from worker.config import Config
from worker.errors import StoreError
from worker.rate_limit import RateLimit
from worker.redis.client import RedisClient
from worker.redis.counters.counter_index import INDEX_SHARDS, CounterIndex
from worker.redis.counters.counter_merger import CounterMerger, RowMerge
from worker.redis.counters.counter_rows import pack_rows, row_fault, rows_as_deltas, unpack_rows
from worker.redis.popular_slate import popular_slate
from worker.redis.slates import SlateStore

log = logging.get("counters")
MERGE_BATCH_ROWS = 32  # per pipeline: one keeps Redis from the rings' pushes for 3 ms
READ_BATCH_ROWS = 512  # per pipeline and replacement: one keeps the pipeline's thread from ranking for 3 ms
MIN_FREE_FRACTION = 1 / 8  # of the vocabulary: indexed but inactive items must not replace those that were evicted
LAST_MERGE_S = 5.0  # at most, after the drain: a pod is killed 30 s after SIGTERM. Merging 10,000 rows takes 1 s
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
        self._log_limit = RateLimit(time.monotonic)
        self._index = CounterIndex(client, self._report_invalid)
        self._merger = CounterMerger(client, config.counters, self._index, self._latest_ms, self._report_invalid)
        self._failing = False
        self._round = 0
        artifact_rows = counters.rows(counters.counted())
        self._artifact_counts: CountDeltas | None = rows_as_deltas(artifact_rows, counters.newest_ms)  # until loaded
        self._artifact_vocabulary_version = self._vocabulary.version
        counters.log = DeltaLog()

    async def run(self) -> None:
        """Merge every `counters.merge_interval_s` until cancelled, and then once more, within LAST_MERGE_S.

        A round is not interrupted while there is time, but a load is: it has nothing to save.
        """
        merging = asyncio.create_task(self.merge(), name="merge")
        try:
            while True:
                await asyncio.shield(merging)
                await asyncio.sleep(self._config.counters.merge_interval_s)
                merging = asyncio.create_task(self.merge(), name="merge")
        except asyncio.CancelledError:
            await self._finish(merging)
            raise

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
        return True

    async def _finish(self, merging: asyncio.Task[bool]) -> None:
        """End the round and merge what was counted since."""
        if self._artifact_counts is not None:
            merging.cancel()  # it loads
        try:
            async with asyncio.timeout(min(LAST_MERGE_S, self._config.health.drain_timeout_s)):
                await asyncio.wait({merging})
                async with self._pin_items():
                    await self._send_deltas()
        except (StoreError, TimeoutError) as error:
            log.warning("the last counts of this process are not merged", error=str(error) or repr(error))
        finally:
            merging.cancel()
            for outcome in await asyncio.gather(merging, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.warning("the last round failed", error=repr(outcome))

    async def _merge(self) -> None:
        if self._artifact_counts is not None:
            evicted = self._vocabulary.evicted_since(self._artifact_vocabulary_version)
            await self._load(self._artifact_counts.without(evicted))
            self._artifact_counts = None
        merged, refused = await self._send_deltas()
        await self._refresh(self._round % INDEX_SHARDS, merged)
        self._round += 1
        await self._write_popular()
        if refused is not None:
            raise refused

    async def _load(self, artifact_counts: CountDeltas) -> None:
        """Read all rows; an item that only the artifact has counted gets its row from there."""
        # All shards first: a row names items of any shard.
        shards = [await self._read_index(shard) for shard in range(INDEX_SHARDS)]
        for shard, (shard_items, missing) in enumerate(shards):
            await self._read_rows(shard, shard_items + missing, missing)
        ids = self._vocabulary.item_ids
        unshared = [token for token in artifact_counts.items.tolist() if ids[token] not in self._index]
        seeds = artifact_counts.select(np.array(unshared, np.int32))
        log.info("counters loaded", shared=len(self._index), from_artifact=len(seeds.items))
        if (refused := await self._merge_rows(seeds, set(), set(), "absent")) is not None:
            raise refused  # the next round loads again

    async def _send_deltas(self) -> tuple[set[int], StoreError | None]:
        """Return the tokens whose rows were merged, and the first error of a row that is merged later.

        When this raises, counts of rows that were not sent are in the counters' log again.
        """
        await self._replace_rows_of(await self._merger.settle())
        raw = await self._run_in_thread(self._counters.take_deltas)
        # In another thread: sums what 8 k events/s leave in 15 s (2.4 M pairs) in 0.6 s, mostly without the GIL.
        deltas: CountDeltas = await asyncio.to_thread(raw.summed, self._config.counters.neighbours)
        sent: set[int] = set()
        merged: set[int] = set()
        try:
            refused = await self._merge_rows(deltas, sent, merged)
        finally:
            unsent = deltas.select(np.setdiff1d(deltas.touched(), np.array(sorted(sent), np.int32)))
            await self._run_in_thread(lambda: self._counters.put_back(unsent))
        return merged, refused

    async def _merge_rows(
        self, deltas: CountDeltas, sent: set[int], merged: set[int], condition: str = ""
    ) -> StoreError | None:
        """Add to the rows in Redis and read the sums back. Returns the first error of a row that Redis may take later.

        sent, merged: get the tokens whose counts are out of this process's hands, and those whose sums were read back
        """
        rows = pack_rows(deltas, self._vocabulary.hashes)
        mark = self._merger.next_mark()
        refused: StoreError | None = None
        values: dict[int, bytes] = {}
        while batch := list(islice(rows, MERGE_BATCH_ROWS)):
            merges = [self._row_merge(deltas, row, mark, condition) for row in batch]
            tokens = [token for token, _, _ in batch]
            sent.update(tokens)
            replies = dict(zip(tokens, await self._merger.send(merges), strict=True))
            errors = {token: reply for token, reply in replies.items() if isinstance(reply, StoreError)}
            later = {token: error for token, error in errors.items() if error.retriable}
            sent.difference_update(later)
            refused = refused or next(iter(later.values()), None)
            if refused is not None and len(later) == MERGE_BATCH_ROWS:
                raise refused  # of every row: not one of a cluster's shards, but all of Redis refuses
            values |= {token: reply for token, reply in replies.items() if not isinstance(reply, StoreError)}
            if len(values) >= READ_BATCH_ROWS:
                await self._replace_rows(values)
                merged.update(values)
                values = {}
        await self._replace_rows(values)
        merged.update(values)
        return refused

    def _row_merge(self, deltas: CountDeltas, row: tuple[int, float, bytes], mark: bytes, condition: str) -> RowMerge:
        token, popularity, pairs = row
        item_id = self._vocabulary.item_ids[token]
        return self._merger.row_merge(item_id, deltas.as_of_ms, popularity, pairs, mark, condition)

    def _latest_ms(self) -> int:
        """Return the latest time that a row may be of: the stream accepts no event after it."""
        return max(self._now_ms() + int(1000 * self._config.events.max_clock_skew_s), self._counters.newest_ms)

    async def _refresh(self, shard: int, merged: set[int]) -> None:
        """Read a shard's rows again, except those that were just merged."""
        ids, missing = await self._read_index(shard)
        tokens = self._vocabulary.tokens_of_ids(ids).tolist()
        unmerged = [item_id for item_id, token in zip(ids, tokens, strict=True) if token not in merged]
        await self._read_rows(shard, unmerged + missing, missing)

    async def _read_index(self, shard: int) -> tuple[list[str], list[str]]:
        """Return the items of a shard, admitted while the vocabulary has enough free slots, and those it lacks."""
        ids, missing = await self._index.read(shard)
        await self._run_in_thread(lambda: self._admit(ids))
        return ids, missing

    def _admit(self, ids: Sequence[str]) -> None:
        reserved = int(self._vocabulary.max_items * MIN_FREE_FRACTION)
        free = max(0, self._vocabulary.free_slots - reserved)
        self._vocabulary.admit(self._vocabulary.unknown(ids)[:free])

    async def _read_rows(self, shard: int, ids: Sequence[str], missing: Sequence[str]) -> None:
        """Take over the rows of these items, and correct the index, which lacks some, by what was found."""
        for batch in _batches(ids):
            replies = await self._client.replies([("GET", self._client.keys.counts(item_id)) for item_id in batch])
            stored: dict[str, bytes] = {}
            expired: list[str] = []
            for item_id, reply in zip(batch, replies, strict=True):
                if isinstance(reply, StoreError):
                    self._raise_or_report(item_id, reply)
                elif reply is None:
                    expired.append(item_id)
                else:
                    stored[item_id] = reply
            await self._replace_rows_of(stored)
            await self._index.update(shard, missing, stored.keys(), expired)

    async def _replace_rows_of(self, rows: Mapping[str, bytes]) -> None:
        """Replace the counts of these items by their rows."""
        tokens = self._vocabulary.tokens_of_ids(list(rows)).tolist()
        await self._replace_rows({token: row for token, row in zip(tokens, rows.values(), strict=True) if token})

    async def _replace_rows(self, values: Mapping[int, bytes]) -> None:
        """Replace the counts of these tokens by their rows."""
        usable: dict[int, bytes] = {}
        for token, value in values.items():
            if fault := row_fault(value):
                self._report_invalid(self._client.keys.counts(self._vocabulary.item_ids[token]), fault)
            else:
                usable[token] = value
        slots = self._config.counters.neighbours
        rows = unpack_rows(list(usable), list(usable.values()), self._vocabulary, slots)
        rows.as_of_ms = np.minimum(rows.as_of_ms, self._latest_ms())
        await self._run_in_thread(lambda: self._counters.replace_rows(rows))

    def _raise_or_report(self, item_id: str, error: StoreError) -> None:
        if error.retriable:
            raise error
        self._report_invalid(self._client.keys.counts(item_id), error)

    def _report_invalid(self, key: str, reason: object) -> None:
        """Count and log content of a key that cannot be used."""
        metrics.INVALID_COUNTERS.inc()
        if (not_logged := self._log_limit.admit()) is not None:
            log.warning("skipping invalid counters", key=key, reason=str(reason), not_logged=not_logged)

    async def _write_popular(self) -> None:
        """Write the slate of users without one of their own."""
        slate_size = self._config.pipeline.slate_size
        tokens, scores = await self._run_in_thread(lambda: self._counters.popular(slate_size))
        as_of_ms = self._counters.newest_ms
        ids = [self._vocabulary.item_ids[token] for token in tokens.tolist()]
        if ids:
            topic = self._config.kafka.events_topic
            slate = popular_slate(ids, scores.tolist(), topic, as_of_ms, self._version(), self._now_ms())
            await self._slates.put_popular(slate, as_of_ms)


def _batches(values: Sequence[T]) -> Iterator[Sequence[T]]:
    return (values[start : start + READ_BATCH_ROWS] for start in range(0, len(values), READ_BATCH_ROWS))
