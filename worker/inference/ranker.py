"""Run the pipeline in a thread of its own: batches in, slates out, while the event loop stays free."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TypeVar

import numpy as np

from pipeline.evaluation.business_metrics import BUSINESS_METRICS, business_metrics
from pipeline.records import Histories, Item
from pipeline.serving.batch_result import BatchResult
from pipeline.serving.eviction import evict_for
from pipeline.serving.generation import Generation
from pipeline.serving.pipeline import Pipeline
from pipeline.slates import Covers, Latency, Slate, SlateItem
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategy import RankedItems, Strategy
from worker import logging, metrics
from worker.executor import SingleThreadExecutor
from worker.interfaces import Batch, Clock, ConsumedEvent, Entry

log = logging.get("ranker")
SERVED_USERS = 64  # their mean overlap with a model's slates is within 0.03 (one slate's standard deviation: 0.11)
ServedSample = tuple[bytes, list[SlateItem]]  # a ring, and the slate that the model gave for it
T = TypeVar("T")


class PipelineRanker:
    """Implements Ranker. The pipeline is not thread-safe, and a batch takes milliseconds: one thread makes all calls.

    strategy: where the fallback order starts for batches that request none; None: with the best healthy strategy
    """

    def __init__(self, pipeline: Pipeline, slate_size: int, clock: Clock, strategy: str | None = None) -> None:
        self.pipeline = pipeline
        self._slate_size = slate_size
        self._clock = clock
        self._strategy = strategy
        self._executor = SingleThreadExecutor("pipeline")
        self._observed: Future | None = None
        self._served: deque[ServedSample] = deque(maxlen=SERVED_USERS)  # by the model that serves now
        self._pin_lock = asyncio.Lock()
        self._exported_evicted = 0
        self._exported_rejected = 0
        metrics.MODEL.labels(pipeline.version).set(1)

    async def rank(self, batch: Batch) -> list[Slate]:
        """See Ranker."""
        return await self._executor.run(self._rank, batch)

    async def run_in_thread(self, function: Callable[[], T]) -> T:
        """Run `function` in the pipeline's thread, the only one that reads and writes vocabulary and counters."""
        return await self._executor.run(function)

    async def observe(self, events: Sequence[ConsumedEvent]) -> None:
        """Count the events that were new to their rings, before any later batch is ranked."""
        if self._observed is not None:
            await asyncio.wrap_future(self._observed)  # at most one count is pending: that bounds the queue
        rings: dict[str, bytes] = {}  # each user's latest
        new_counts: dict[str, int] = {}
        for consumed in events:
            user = consumed.event.user_id
            rings[user] = consumed.ring
            new_counts[user] = new_counts.get(user, 0) + consumed.is_new
        items = [consumed.event.item_id for consumed in events]
        self._observed = self._executor.submit(self._observe, items, list(rings.values()), list(new_counts.values()))

    async def update_items(self, items: Collection[Item], delisted: Collection[str], live: bool) -> None:
        """Apply item records and delistings. live: they have just arrived, so items are evicted to make room."""
        await self._executor.run(self._update_items, items, delisted, live)

    @asynccontextmanager
    async def pin_items(self, item_ids: Collection[str] = ()) -> AsyncIterator[None]:
        """Keep every token's item while the body runs, so that tokens may be used outside the pipeline's thread.

        First evicts items to make room for `item_ids`. One caller at a time; the others wait.
        """
        async with self._pin_lock:
            await self._executor.run(self._pin_items, item_ids)
            try:
                yield
            finally:
                self.pipeline.vocabulary.pinned = False

    async def served_samples(self) -> list[ServedSample]:
        """Return the serving model's latest slates with their rings, at most SERVED_USERS."""
        return await self._executor.run(list, self._served)

    async def swap(self, strategies: Sequence[Strategy], version: str) -> Generation:
        """Replace all strategies; slates carry the version that ranked them. See Pipeline.swap for what it returns."""
        return await self._executor.run(self._swap, strategies, version)

    async def stop(self, timeout_s: float) -> None:
        """Wait for the calls that are queued or run, at most this long; a call that hangs keeps its thread."""
        if not await self._executor.finishes_within(timeout_s):
            log.warning("the pipeline's thread still runs", waited_s=round(timeout_s, 1))
        self._executor.close(wait=False)

    def close(self) -> None:
        self._executor.close()

    def _observe(self, items: list[str], rings: list[bytes], new_counts: list[int]) -> None:
        self.pipeline.admit(items)
        self.pipeline.observe(*Histories.from_rings_and_new(rings, np.array(new_counts, np.int64)))
        self._export_item_metrics()

    def _update_items(self, items: Collection[Item], delisted: Collection[str], live: bool) -> None:
        apply = self.pipeline.update_items if live else self.pipeline.load_items
        apply(items, delisted)
        self._export_item_metrics()

    def _pin_items(self, item_ids: Collection[str]) -> None:
        evict_for(item_ids, self.pipeline.catalogue, self.pipeline.counters)
        self.pipeline.vocabulary.pinned = True

    def _export_item_metrics(self) -> None:
        vocabulary = self.pipeline.vocabulary
        evicted = vocabulary.evicted_count - self._exported_evicted
        metrics.VOCABULARY.set(vocabulary.max_items - vocabulary.free_slots)
        metrics.EVICTED_ITEMS.inc(evicted)
        metrics.REJECTED_ITEMS.inc(vocabulary.rejected_count - self._exported_rejected)
        if evicted:
            log.info(
                "vocabulary full: evicting least recently seen items", evicted=evicted, max_items=vocabulary.max_items
            )
        if vocabulary.rejected_count and not self._exported_rejected:
            log.warning(
                "vocabulary full: new items stay unknown (logged once, then counted); raise counters.max_items",
                rejected=vocabulary.rejected_count,
                max_items=vocabulary.max_items,
            )
        self._exported_evicted = vocabulary.evicted_count
        self._exported_rejected = vocabulary.rejected_count

    def _swap(self, strategies: Sequence[Strategy], version: str) -> Generation:
        metrics.MODEL.remove(self.pipeline.version)
        replaced = self.pipeline.swap(strategies, version)
        metrics.MODEL.labels(version).set(1)
        self._served.clear()
        return replaced

    def _rank(self, batch: Batch) -> list[Slate]:
        rings = [entry.ring for entry in batch.entries]
        histories = Histories.from_rings(rings)
        lengths = [entry.events[0].k or self._slate_size for entry in batch.entries]
        deadline_s = time.monotonic() + (batch.deadline_ms - self._clock.now_ms()) / 1e3
        result = self.pipeline.rank(histories, max(lengths), batch.strategy or self._strategy, deadline_s)
        for ring, slate, origin in zip(rings, result.slates, result.origins, strict=True):
            if origin.strategy != SimpleStrategy.name:
                self._served.append((ring, slate))
        metrics.BATCH_USERS.observe(len(batch.entries))
        stages_ms = {"features": result.features_ms, "encode": result.encode_ms, "rank": result.rank_ms}
        for stage, stage_ms in stages_ms.items():
            metrics.STAGE_SECONDS.labels(stage).observe(stage_ms / 1e3)
        for ranked in result.ranked:
            _count_business_metrics(ranked)
        return self._slates(batch, result, lengths)

    def _slates(self, batch: Batch, result: BatchResult, lengths: list[int]) -> list[Slate]:
        """Put the slates together, each of at most so many items."""
        now_s = self._clock.monotonic()
        now_ms = self._clock.now_ms()
        features, encode, rank = (round(each, 3) for each in (result.features_ms, result.encode_ms, result.rank_ms))
        slates: list[Slate] = []
        for entry, items, origin, k in zip(batch.entries, result.slates, result.origins, lengths, strict=True):
            polled_s = entry.events[0].polled_s
            latency = Latency(
                queue=round(1e3 * (batch.opened_s - polled_s), 3),
                features=features,
                encode=encode,
                rank=rank,
                total=round(1e3 * (now_s - polled_s), 3),
            )
            slates.append(
                Slate(
                    user_id=entry.user_id,
                    items=items if len(items) <= k else items[:k],
                    strategy=origin.strategy,
                    backend=origin.backend,
                    why=origin.why,
                    model_version=result.version,
                    covers=_covers(entry),
                    created_ms=now_ms,
                    latency_ms=latency,
                )
            )
        metrics.SLATE_SECONDS.observe_all([slate.latency_ms.total / 1e3 for slate in slates])
        return slates


def _count_business_metrics(ranked: RankedItems) -> None:
    expected = business_metrics(ranked, ranked.tokens.shape[1])  # one row per slate
    if expected is None:
        return
    metrics.SLATES_WITH_EXPECTED_VALUE.inc(len(expected))
    for name, total in zip(BUSINESS_METRICS, expected.sum(axis=0).tolist(), strict=True):
        metrics.EXPECTED_VALUE.labels(name).inc(total)


def _covers(entry: Entry) -> Covers:
    first = entry.events[0].record_offset
    last = entry.events[-1].record_offset
    oldest_ts_ms = min(consumed.event.ts_ms for consumed in entry.events)
    topic, partition = first.partition
    return Covers(topic, partition, first.offset, last.offset, len(entry.events), oldest_ts_ms)
