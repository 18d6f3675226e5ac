"""Between the event loop and the pipeline: a batch goes to the pipeline's own thread, slates come back."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.evaluation.business_metrics import BUSINESS_METRICS, business_metrics
from pipeline.records import Covers, Histories, Item, Latency, Slate, SlateItem
from pipeline.serving.eviction import evict_for
from pipeline.serving.pipeline import BatchResult, Pipeline
from pipeline.serving.simple_strategy import SimpleStrategy
from pipeline.serving.strategy import RankedItems, Strategy
from worker import logging, metrics
from worker.interfaces import Batch, Clock, ConsumedEvent, Entry

if TYPE_CHECKING:
    pass

log = logging.get("ranker")
SERVED_USERS = 64  # their mean overlap with a model's slates is within 0.03 (one slate's standard deviation: 0.11)
ServedSample = tuple[bytes, list[SlateItem]]  # a ring, and the model's answer to it
T = TypeVar("T")


class PipelineRanker:
    """The pipeline is not thread-safe and a batch takes milliseconds: one thread of its own does both, in order."""

    def __init__(self, pipeline: Pipeline, slate_items: int, clock: Clock, strategy: str | None = None) -> None:
        self.pipeline = pipeline
        self._slate_size, self._clock, self._strategy = slate_items, clock, strategy
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._observed: Future | None = None
        self._served: deque[ServedSample] = deque(maxlen=SERVED_USERS)  # by the model that serves now
        self._pin_lock = asyncio.Lock()
        self._evicted = self._rejected = 0
        metrics.MODEL.labels(pipeline.version).set(1)

    async def rank(self, batch: Batch) -> list[Slate]:
        """One slate an entry, in the batch's order."""
        return await self.run_in_thread(lambda: self._rank(batch))

    async def run_in_thread(self, act: Callable[[], T]) -> T:
        """Run `act` in the pipeline's thread: it alone reads and writes the vocabulary and the counters."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    async def observe(self, events: Sequence[ConsumedEvent]) -> None:
        """Counts the events that were new to their rings, before any later batch is ranked."""
        if self._observed is not None:
            await asyncio.wrap_future(self._observed)  # at most one count is under way: that bounds the queue
        newest, fresh = {}, {}
        for consumed in events:
            user = consumed.event.user_id
            newest[user] = consumed.ring
            fresh[user] = fresh.get(user, 0) + consumed.is_new
        items = [consumed.event.item_id for consumed in events]
        self._observed = self._thread.submit(self._observe, items, list(newest.values()), list(fresh.values()))

    async def update_items(self, items: Collection[Item], delisted: Collection[str], live: bool) -> None:
        """Takes over items' records; `news`: they have just come, room is made for them."""
        await self.run_in_thread(lambda: self._update_items(items, delisted, live))

    @asynccontextmanager
    async def pin_items(self, item_ids: Collection[str] = ()) -> AsyncIterator[None]:
        """Inside, no token loses its item, so that tokens may be used outside of the pipeline's thread. Before that,
        room is made for these items. One holds at a time."""
        async with self._pin_lock:
            await self.run_in_thread(lambda: self._pin_items(item_ids))
            try:
                yield
            finally:
                self.pipeline.vocabulary.pinned = False

    async def served_samples(self) -> list[ServedSample]:
        """The newest answers of the serving model, at most SERVED_USERS."""
        return await self.run_in_thread(lambda: list(self._served))

    async def swap_model(self, model: Strategy, version: str) -> None:
        """Exchange the model between two batches; slates carry the version that ranked them."""
        await self.run_in_thread(lambda: self._swap_model(model, version))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _observe(self, items: list[str], rings: list[bytes], fresh: list[int]) -> None:
        self.pipeline.admit(items)
        self.pipeline.observe(Histories.from_rings(rings), np.array(fresh, np.int64))
        self._export_item_metrics()

    def _update_items(self, items: Collection[Item], withdrawn: Collection[str], news: bool) -> None:
        (self.pipeline.update_items if news else self.pipeline.load_items)(items, withdrawn)
        self._export_item_metrics()

    def _pin_items(self, item_ids: Collection[str]) -> None:
        evict_for(item_ids, self.pipeline.catalogue, self.pipeline.counters)
        self.pipeline.vocabulary.pinned = True

    def _export_item_metrics(self) -> None:
        vocabulary = self.pipeline.vocabulary
        metrics.VOCABULARY.set(vocabulary.max_items - vocabulary.free_slots)
        metrics.EVICTED_ITEMS.inc(vocabulary.evicted_count - self._evicted)
        metrics.REJECTED_ITEMS.inc(vocabulary.rejected_count - self._rejected)
        if vocabulary.evicted_count > self._evicted:
            log.info(
                "vocabulary full: evicting least recently seen items",
                evicted=vocabulary.evicted_count - self._evicted,
                max_items=vocabulary.max_items,
            )
        if vocabulary.rejected_count and not self._rejected:
            log.warning(
                "vocabulary full: new items stay unknown (logged once, then counted); raise counters.max_items",
                rejected=vocabulary.rejected_count,
                max_items=vocabulary.max_items,
            )
        self._evicted, self._rejected = vocabulary.evicted_count, vocabulary.rejected_count

    def _swap_model(self, model: Strategy, version: str) -> None:
        metrics.MODEL.remove(self.pipeline.version)
        self.pipeline.swap_model(model, version)
        metrics.MODEL.labels(version).set(1)
        self._served.clear()

    def _rank(self, batch: Batch) -> list[Slate]:
        rings = [entry.ring for entry in batch.entries]
        histories = Histories.from_rings(rings)
        lengths = [entry.events[0].k or self._slate_size for entry in batch.entries]
        answer = self.pipeline.rank(histories, max(lengths), batch.strategy or self._strategy)
        if answer.strategy != SimpleStrategy.name:
            self._served.extend(zip(rings, answer.rows, strict=True))
        metrics.BATCH_USERS.observe(len(batch.entries))
        for stage in ("features", "encode", "rank"):
            metrics.STAGE_SECONDS.labels(stage).observe(getattr(answer, f"{stage}_ms") / 1e3)
        _count_business_metrics(answer.ranked)
        rows = zip(batch.entries, answer.rows, lengths, strict=True)
        return [self._slate(batch, entry, answer, items[:k]) for entry, items, k in rows]

    def _slate(self, batch: Batch, entry: Entry, answer: BatchResult, items: list) -> Slate:
        total_s = self._clock.monotonic() - entry.events[0].polled_s
        metrics.SLATE_SECONDS.observe(total_s)
        latency = Latency(
            queue=round(1e3 * (batch.opened_s - entry.events[0].polled_s), 3),
            features=round(answer.features_ms, 3),
            encode=round(answer.encode_ms, 3),
            rank=round(answer.rank_ms, 3),
            total=round(1e3 * total_s, 3),
        )
        return Slate(
            entry.user_id, items, answer.strategy, self.pipeline.version, _covers(entry), self._clock.now_ms(), latency
        )


def _count_business_metrics(ranked: RankedItems) -> None:
    measures = business_metrics(ranked, ranked.tokens.shape[1])
    if measures is None:
        return
    metrics.SLATES_WITH_EXPECTED_VALUE.inc(len(measures))
    for name, total in zip(BUSINESS_METRICS, measures.sum(axis=0).tolist(), strict=True):
        metrics.EXPECTED_VALUE.labels(name).inc(total)


def _covers(entry: Entry) -> Covers:
    first, last = entry.events[0].record_offset, entry.events[-1].record_offset
    oldest_ts_ms = min(consumed.event.ts_ms for consumed in entry.events)
    topic, partition = first.partition
    return Covers(topic, partition, first.offset, last.offset, len(entry.events), oldest_ts_ms)
