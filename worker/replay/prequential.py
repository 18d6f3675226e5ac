"""Online hit rate: each event is judged by the slate its user had before it, in serving and by shadow rankings alike.

A user's first event is judged by the popular items, which is what a lookup would have answered. Shadows (frozen
co-occurrence, frozen popularity) rank the same histories in the same batch, so that one run compares them all.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.records import Histories, Slate
from pipeline.serving.pipeline import Pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, ConsumedEvent

Baseline = Callable[[Histories, int], np.ndarray]  # (histories, k) -> int32 [n, k] tokens
TOP = 10


class PrequentialEvaluator:
    """A Ranker's stand-in that also ranks by the shadows, and the worker's audience that judges.

    from_ts_ms: events before it are not scored (a model has been trained on them).
    """

    def __init__(
        self, ranker: PipelineRanker, baselines: dict[str, Baseline], popular: Sequence[str], from_ts_ms: int = 0
    ) -> None:
        self._ranker, self._baselines, self._from_ts_ms = ranker, baselines, from_ts_ms
        self._popular = list(popular[:TOP])
        self._shown: dict[str, dict[str, list[str]]] = {}  # by user: what each ranking shows now
        self._pending: dict[str, dict[str, list[str]]] = {}  # ranked by the shadows, not yet delivered
        self.answered = 0  # distinct events with a slate
        self.scored = 0
        self.hits: Counter[str] = Counter()
        self.strategies: Counter[str] = Counter()
        self.totals_ms: list[float] = []  # of every slate since the last `take_latencies`

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
        """Judge the batch's events by what their users were shown before, then show the new slates."""
        for entry, slate in zip(batch.entries, slates, strict=True):
            shown = self._shown.get(slate.user_id)
            for consumed in entry.events:
                self._score(shown, consumed)
            if entry.events[-1].event.ts_ms >= self._from_ts_ms:
                self.totals_ms.append(slate.latency_ms.total)
            coming = self._pending.pop(slate.user_id, {})
            self._shown[slate.user_id] = {"slate": [item.item_id for item in slate.items[:TOP]], **coming}
        self.strategies[slates[0].strategy] += len(slates)

    @property
    def rankings(self) -> list[str]:
        """The slates' own, then the shadows'."""
        return ["slate", *self._baselines]

    def hit_rate(self, ranking: str) -> float:
        return self.hits[ranking] / self.scored if self.scored else float("nan")

    def take_latencies(self) -> list[float]:
        taken, self.totals_ms = self.totals_ms, []
        return taken

    def _score(self, shown: dict[str, list[str]] | None, consumed: ConsumedEvent) -> None:
        self.answered += consumed.is_new
        if consumed.event.ts_ms < self._from_ts_ms or not consumed.is_new:
            return
        self.scored += 1
        for ranking in self.rankings:
            self.hits[ranking] += consumed.event.item_id in (shown[ranking] if shown else self._popular)

    def _rank_baselines(self, batch: Batch) -> None:
        histories = Histories.from_rings([entry.ring for entry in batch.entries])
        ids = self._ranker.pipeline.vocabulary.item_ids
        for name, shadow in self._baselines.items():
            for entry, row in zip(batch.entries, shadow(histories, TOP).tolist(), strict=True):
                self._pending.setdefault(entry.user_id, {})[name] = [ids[token] for token in row if token]
