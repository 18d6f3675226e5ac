"""Prequential evaluation: each event is scored by the slate that its user had before it, then updates the history.

A user's first event is scored by the popular items, which is what a lookup would have answered. Baselines (frozen
co-occurrence, frozen popularity) rank the same histories in the same batch, so one run compares them all.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.records import Histories, item_hash
from pipeline.serving.pipeline import Pipeline
from pipeline.slates import Slate
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, ConsumedEvent

Baseline = Callable[[Histories, int], np.ndarray]  # (histories, k) -> int32 [n, k] tokens
CUTOFF = 10
NOTHING = np.empty(0, np.uint64)


class PrequentialEvaluator:
    """Implements Ranker: passes batches to `ranker`, ranks them by the baselines as well, and scores what is delivered.

    popular: items shown to a user without a slate, most popular first
    score_from_ms: events before it are not scored (the model was trained on them)
    """

    def __init__(
        self, ranker: PipelineRanker, baselines: dict[str, Baseline], popular: Sequence[str], score_from_ms: int = 0
    ) -> None:
        self._ranker = ranker
        self._baselines = baselines
        self._score_from_ms = score_from_ms
        self._popular = list(popular[:CUTOFF])
        self._shown: dict[str, dict[str, list[str]]] = {}  # by user and ranking: the items last shown
        self._pending: dict[str, dict[str, list[str]]] = {}  # the same of the baselines, not yet delivered
        self.answered = 0  # distinct events with a slate
        self.scored = 0
        self.tied = 0  # scored events with the time of their user's event before
        self.excluded = 0  # scored events whose item was kept off the slate before; not counted without baselines
        self.hits: Counter[str] = Counter()
        self.untied_hits: Counter[str] = Counter()
        self._latest_ms: dict[str, int] = {}  # by user: time of the event before
        self._excluded: dict[str, np.ndarray] = {}  # by user: items kept off the slate last shown, uint64 hashes
        self._pending_excluded: dict[str, np.ndarray] = {}  # the same of slates not yet delivered
        self.strategies: Counter[str] = Counter()  # slates by strategy
        self.backends: Counter[str] = Counter()  # slates by backend
        self.latencies_ms: list[float] = []  # of every scored slate since the last `take_latencies`

    async def rank(self, batch: Batch) -> list[Slate]:
        slates = await self._ranker.rank(batch)
        if self._baselines:
            await self._ranker.run_in_thread(lambda: self._rank_baselines(batch))
        return slates

    @property
    def pipeline(self) -> Pipeline:
        return self._ranker.pipeline

    async def observe(self, events: Sequence[ConsumedEvent]) -> None:
        await self._ranker.observe(events)

    def on_delivered(self, batch: Batch, slates: Sequence[Slate]) -> None:
        """Score the batch's events by what their users were shown before, then show the new slates."""
        for entry, slate in zip(batch.entries, slates, strict=True):
            shown = self._shown.get(slate.user_id)
            for consumed in entry.events:
                self._score(shown, consumed)
            if entry.events[-1].event.ts_ms >= self._score_from_ms:
                self.latencies_ms.append(slate.latency_ms.total)
            baselines = self._pending.pop(slate.user_id, {})
            self._excluded[slate.user_id] = self._pending_excluded.pop(slate.user_id, NOTHING)
            self._shown[slate.user_id] = {"slate": [item.item_id for item in slate.items[:CUTOFF]], **baselines}
        self.strategies.update(slate.strategy for slate in slates)
        self.backends.update(slate.backend for slate in slates)

    @property
    def rankings(self) -> list[str]:
        """The name of the slates' own ranking, then the baselines'."""
        return ["slate", *self._baselines]

    def hit_rate(self, ranking: str) -> float:
        return self.hits[ranking] / self.scored if self.scored else float("nan")

    def untied_hit_rate(self, ranking: str) -> float:
        """Return the hit rate on events with a time of their own, of which there must be one."""
        return self.untied_hits[ranking] / (self.scored - self.tied)

    def take_latencies(self) -> list[float]:
        latencies_ms = self.latencies_ms
        self.latencies_ms = []
        return latencies_ms

    def _score(self, shown: dict[str, list[str]] | None, consumed: ConsumedEvent) -> None:
        self.answered += consumed.is_new
        event = consumed.event
        is_tied = self._latest_ms.get(event.user_id) == event.ts_ms
        self._latest_ms[event.user_id] = event.ts_ms
        if event.ts_ms < self._score_from_ms or not consumed.is_new:
            return
        self.scored += 1
        self.tied += is_tied
        self.excluded += item_hash(event.item_id) in self._excluded.get(event.user_id, NOTHING)
        for ranking in self.rankings:
            is_hit = event.item_id in (shown[ranking] if shown else self._popular)
            self.hits[ranking] += is_hit
            self.untied_hits[ranking] += is_hit and not is_tied

    def _rank_baselines(self, batch: Batch) -> None:
        histories = Histories.from_rings([entry.ring for entry in batch.entries])
        excluded = np.where(self._ranker.pipeline.options.exclusion.mask(histories), histories.items, 0)
        by_user = np.split(excluded, histories.offsets[1:-1])
        self._pending_excluded |= {entry.user_id: each for entry, each in zip(batch.entries, by_user, strict=True)}
        item_ids = self._ranker.pipeline.vocabulary.item_ids
        for name, baseline in self._baselines.items():
            for entry, row in zip(batch.entries, baseline(histories, CUTOFF).tolist(), strict=True):
                self._pending.setdefault(entry.user_id, {})[name] = [item_ids[token] for token in row if token]
