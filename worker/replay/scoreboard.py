"""Online hit rate: each event is judged by the slate its user had before it, in serving and by shadow rankings alike.

A user's first event is judged by the popular items, which is what a lookup would have answered. Shadows (frozen
co-occurrence, frozen popularity) rank the same histories in the same batch, so that one run compares them all.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.records import Histories, Slate
from pipeline.serving.pipeline import Pipeline
from worker.inference.ranker import Ranker
from worker.interfaces import Arrival, Batch

Shadow = Callable[[Histories, int], np.ndarray]  # (histories, k) -> int32 [n, k] tokens
TOP = 10


class Scoreboard:
    """A Ranker's stand-in that also ranks by the shadows, and the worker's audience that judges.

    from_ts_ms: events before it are not scored (a model has been trained on them).
    """

    def __init__(self, ranker: Ranker, shadows: dict[str, Shadow], popular: Sequence[str], from_ts_ms: int = 0) -> None:
        self._ranker, self._shadows, self._from_ts_ms = ranker, shadows, from_ts_ms
        self._popular = list(popular[:TOP])
        self._shown: dict[str, dict[str, list[str]]] = {}  # by user: what each ranking shows now
        self._coming: dict[str, dict[str, list[str]]] = {}  # ranked by the shadows, not yet delivered
        self.answered = 0  # distinct events with a slate
        self.scored = 0
        self.hits: Counter[str] = Counter()
        self.rungs: Counter[str] = Counter()
        self.totals_ms: list[float] = []  # of every slate since the last `take_latencies`

    async def rank(self, batch: Batch) -> list[Slate]:
        slates = await self._ranker.rank(batch)
        if self._shadows:
            await self._ranker.within(lambda: self._rank_shadows(batch))
        return slates

    @property
    def pipeline(self) -> Pipeline:
        return self._ranker.pipeline

    async def observe(self, arrivals: Sequence[Arrival]) -> None:
        await self._ranker.observe(arrivals)

    def audience(self, batch: Batch, slates: Sequence[Slate]) -> None:
        """Judge the batch's events by what their users were shown before, then show the new slates."""
        for entry, slate in zip(batch.entries, slates, strict=True):
            shown = self._shown.get(slate.user_id)
            for arrival in entry.arrivals:
                self._judge(shown, arrival)
            if entry.arrivals[-1].event.ts_ms >= self._from_ts_ms:
                self.totals_ms.append(slate.latency_ms.total)
            coming = self._coming.pop(slate.user_id, {})
            self._shown[slate.user_id] = {"slate": [item.item_id for item in slate.items[:TOP]], **coming}
        self.rungs[slates[0].strategy] += len(slates)

    @property
    def rankings(self) -> list[str]:
        """The slates' own, then the shadows'."""
        return ["slate", *self._shadows]

    def hit_rate(self, ranking: str) -> float:
        return self.hits[ranking] / self.scored if self.scored else float("nan")

    def take_latencies(self) -> list[float]:
        taken, self.totals_ms = self.totals_ms, []
        return taken

    def _judge(self, shown: dict[str, list[str]] | None, arrival: Arrival) -> None:
        self.answered += arrival.fresh
        if arrival.event.ts_ms < self._from_ts_ms or not arrival.fresh:
            return
        self.scored += 1
        for ranking in self.rankings:
            self.hits[ranking] += arrival.event.item_id in (shown[ranking] if shown else self._popular)

    def _rank_shadows(self, batch: Batch) -> None:
        histories = Histories.from_rings([entry.ring for entry in batch.entries])
        ids = self._ranker.pipeline.vocabulary.item_ids
        for name, shadow in self._shadows.items():
            for entry, row in zip(batch.entries, shadow(histories, TOP).tolist(), strict=True):
                self._coming.setdefault(entry.user_id, {})[name] = [ids[token] for token in row if token]
