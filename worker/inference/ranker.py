"""Between the event loop and the pipeline: a batch goes to the pipeline's own thread, slates come back."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from pipeline.backends import GraphOptions
from pipeline.evaluation.business_metrics import MEASURES, worth
from pipeline.records import Covers, Histories, Item, Latency, Slate, SlateItem
from pipeline.serving.eviction import make_room
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.pipeline import Answer, Pipeline, PipelineOptions
from pipeline.serving.simple_strategy import SimpleRung
from pipeline.serving.strategy import Ranked, Rung
from worker import logging, metrics
from worker.config import Config
from worker.errors import ConfigError
from worker.interfaces import Arrival, Batch, Clock, Entry

if TYPE_CHECKING:
    from pipeline.artifact import Manifest

log = logging.get("ranker")
SERVED_USERS = 64  # their mean overlap with a model's slates is within 0.03 (one slate's standard deviation: 0.11)
Served = tuple[bytes, list[SlateItem]]  # a ring, and the model's answer to it
T = TypeVar("T")


class Ranker:
    """The pipeline is not thread-safe and a batch takes milliseconds: one thread of its own does both, in order."""

    def __init__(self, pipeline: Pipeline, slate_items: int, clock: Clock, strategy: str | None = None) -> None:
        self.pipeline = pipeline
        self._slate_items, self._clock, self._strategy = slate_items, clock, strategy
        self._thread = ThreadPoolExecutor(1, "pipeline")
        self._observed: Future | None = None
        self._served: deque[Served] = deque(maxlen=SERVED_USERS)  # by the model that serves now
        self._holding = asyncio.Lock()
        self._retired = self._refused = 0
        metrics.MODEL.labels(pipeline.version).set(1)

    async def rank(self, batch: Batch) -> list[Slate]:
        """One slate an entry, in the batch's order."""
        return await self.within(lambda: self._rank(batch))

    async def within(self, act: Callable[[], T]) -> T:
        """Run `act` in the pipeline's thread: it alone reads and writes the vocabulary and the counters."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    async def observe(self, arrivals: Sequence[Arrival]) -> None:
        """Counts the events that were new to their rings, before any later batch is ranked."""
        if self._observed is not None:
            await asyncio.wrap_future(self._observed)  # at most one count is under way: that bounds the queue
        newest, fresh = {}, {}
        for arrival in arrivals:
            user = arrival.event.user_id
            newest[user] = arrival.ring
            fresh[user] = fresh.get(user, 0) + arrival.fresh
        items = [arrival.event.item_id for arrival in arrivals]
        self._observed = self._thread.submit(self._observe, items, list(newest.values()), list(fresh.values()))

    async def learn(self, items: Collection[Item], withdrawn: Collection[str], news: bool) -> None:
        """Takes over items' records; `news`: they have just come, room is made for them."""
        await self.within(lambda: self._learn(items, withdrawn, news))

    @asynccontextmanager
    async def holding(self, item_ids: Collection[str] = ()) -> AsyncIterator[None]:
        """Inside, no token loses its item, so that tokens may be used outside of the pipeline's thread. Before that,
        room is made for these items. One holds at a time."""
        async with self._holding:
            await self.within(lambda: self._hold(item_ids))
            try:
                yield
            finally:
                self.pipeline.vocabulary.held = False

    async def served(self) -> list[Served]:
        """The newest answers of the serving model, at most SERVED_USERS."""
        return await self.within(lambda: list(self._served))

    async def adopt(self, model: Rung, version: str) -> None:
        """Exchange the model between two batches; slates carry the version that ranked them."""
        await self.within(lambda: self._adopt(model, version))

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _observe(self, items: list[str], rings: list[bytes], fresh: list[int]) -> None:
        self.pipeline.admit(items)
        self.pipeline.observe(Histories.from_rings(rings), np.array(fresh, np.int64))
        self._count_items()

    def _learn(self, items: Collection[Item], withdrawn: Collection[str], news: bool) -> None:
        (self.pipeline.learn if news else self.pipeline.read)(items, withdrawn)
        self._count_items()

    def _hold(self, item_ids: Collection[str]) -> None:
        make_room(item_ids, self.pipeline.catalogue, self.pipeline.counters)
        self.pipeline.vocabulary.held = True

    def _count_items(self) -> None:
        vocabulary = self.pipeline.vocabulary
        metrics.VOCABULARY.set(vocabulary.max_items - vocabulary.room)
        metrics.RETIRED_ITEMS.inc(vocabulary.retired - self._retired)
        metrics.REFUSED_ITEMS.inc(vocabulary.refused - self._refused)
        if vocabulary.retired > self._retired:
            log.info("the vocabulary is full: items unseen for the longest are retired",
                     retired=vocabulary.retired - self._retired, max_items=vocabulary.max_items)  # fmt: skip
        if vocabulary.refused and not self._refused:
            log.warning("new items find no room and stay unknown, which is said once, then counted; raise"
                        " counters.max_items", refused=vocabulary.refused, max_items=vocabulary.max_items)  # fmt: skip
        self._retired, self._refused = vocabulary.retired, vocabulary.refused

    def _adopt(self, model: Rung, version: str) -> None:
        metrics.MODEL.remove(self.pipeline.version)
        self.pipeline.adopt(model, version)
        metrics.MODEL.labels(version).set(1)
        self._served.clear()

    def _rank(self, batch: Batch) -> list[Slate]:
        rings = [entry.ring for entry in batch.entries]
        histories = Histories.from_rings(rings)
        lengths = [entry.arrivals[0].k or self._slate_items for entry in batch.entries]
        answer = self.pipeline.rank(histories, max(lengths), batch.strategy or self._strategy)
        if answer.strategy != SimpleRung.name:
            self._served.extend(zip(rings, answer.rows, strict=True))
        metrics.BATCH_USERS.observe(len(batch.entries))
        for stage in ("features", "encode", "rank"):
            metrics.STAGE_SECONDS.labels(stage).observe(getattr(answer, f"{stage}_ms") / 1e3)
        _count_worth(answer.ranked)
        rows = zip(batch.entries, answer.rows, lengths, strict=True)
        return [self._slate(batch, entry, answer, items[:k]) for entry, items, k in rows]

    def _slate(self, batch: Batch, entry: Entry, answer: Answer, items: list) -> Slate:
        total_s = self._clock.monotonic() - entry.arrivals[0].polled_s
        metrics.SLATE_SECONDS.observe(total_s)
        latency = Latency(
            queue=round(1e3 * (batch.opened_s - entry.arrivals[0].polled_s), 3),
            features=round(answer.features_ms, 3),
            encode=round(answer.encode_ms, 3),
            rank=round(answer.rank_ms, 3),
            total=round(1e3 * total_s, 3),
        )
        return Slate(
            entry.user_id, items, answer.strategy, self.pipeline.version, _covers(entry), self._clock.now_ms(), latency
        )


def _count_worth(ranked: Ranked) -> None:
    measures = worth(ranked, ranked.tokens.shape[1])
    if measures is None:
        return
    metrics.VALUED_SLATES.inc(len(measures))
    for name, total in zip(MEASURES, measures.sum(axis=0).tolist(), strict=True):
        metrics.WORTH.labels(name).inc(total)


def _covers(entry: Entry) -> Covers:
    first, last = entry.arrivals[0].ticket, entry.arrivals[-1].ticket
    oldest_ts_ms = min(arrival.event.ts_ms for arrival in entry.arrivals)
    topic, partition = first.partition
    return Covers(topic, partition, first.offset, last.offset, len(entry.arrivals), oldest_ts_ms)


def load_pipeline(config: Config) -> Pipeline:
    """The pipeline of the configuration. Raises ArtifactError, or ConfigError for an action that is not in the list."""
    batcher, served = config.batcher, config.pipeline
    graphs = GraphOptions(batcher.max_users, batcher.max_tokens, served.graphs_mib, served.slate_items)
    options = msgspec.structs.replace(pipeline_options(config), graphs=graphs if served.kernels else None)
    pipeline = Pipeline.load(config.pipeline.artifact, options, _fell)
    if config.pipeline.artifact is not None:
        from pipeline.artifact import read_manifest  # torch, which only who has a model pays

        warn_of_short_rings(config, read_manifest(Path(config.pipeline.artifact)))
    return pipeline


def warn_of_short_rings(config: Config, manifest: "Manifest") -> None:
    """Where rings are trimmed within the model's reach, its oldest events have other features than in training."""
    cap, reach = config.sequences.cap_events, manifest.config.reach_events
    if cap < reach:
        log.warning(
            "rings are shorter than the model's reach: states of users with longer histories are not as in training; "
            "raise sequences.cap_events, or train with fewer --max-events (with sessions: --history-events)",
            version=manifest.version,
            cap_events=cap,
            wanted=reach,
        )


def pipeline_options(config: Config) -> PipelineOptions:
    """What serving, training and evaluation share. Raises ConfigError for an action that is not in the list."""
    try:
        exclusion = Exclusion.of(config.pipeline.exclude_actions, config.pipeline.exclude_window_days, config.schema)
    except KeyError as error:
        raise ConfigError(f"pipeline.exclude_actions: {error} is not in events.actions") from error
    return PipelineOptions(
        config.schema,
        exclusion,
        config.rerank,
        config.counters.half_life_days,
        config.counters.neighbours,
        config.counters.window_events,
        config.counters.max_items,
        config.pipeline.device,
        config.pipeline.threads,
    )


def _fell(rung: str, error: Exception) -> None:
    metrics.FALLBACKS.labels(rung, type(error).__name__).inc()
    log.warning("a rung failed, the next one answers", rung=rung, error=repr(error))
