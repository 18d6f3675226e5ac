"""The pipeline: packed histories in, ranked items out, by the best strategy that can answer.

It is also a library:

    pipeline = Pipeline.load("artifact")
    for slate in pipeline.recommend([[Event("u1", "i7", "view", 1_700_000_000_000)]], k=10):
        print(slate.strategy, [item.item_id for item in slate.items])
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pipeline.counters.counters import Counters
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, Histories, Item
from pipeline.serving.batch_result import BatchResult, RankedSlates
from pipeline.serving.eviction import evict_for
from pipeline.serving.generation import Fallback, Generation
from pipeline.serving.ranking import Ranking
from pipeline.serving.validation import check_items, check_k, check_new, checked_histories, checked_ids
from pipeline.slates import SlateItem, Why
from pipeline.strategies.conformance import check_answer
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.own_strategies import check_own_strategies
from pipeline.strategies.strategies import StrategyContext, strategies_of
from pipeline.strategies.strategy import FALLBACK_ORDER, FallbackChain, RankedItems, Request, Strategy, close_all

if TYPE_CHECKING:
    from pipeline.artifact import Artifact


class Recommendation(msgspec.Struct, frozen=True):
    """One user's ranked items, the strategy that ranked them, its backend, and why it was taken."""

    items: list[SlateItem]
    strategy: str
    backend: str
    why: Why


def _ignore(fallback: Fallback) -> None:
    """Do nothing: a library's caller sees the strategy in the answer."""


class Pipeline:
    """Catalogue, counters and the chain of strategies. Not thread-safe: one thread ranks and observes."""

    def __init__(
        self,
        options: PipelineOptions,
        catalogue: Catalogue,
        counters: Counters,
        strategies: Sequence[Strategy],
        version: str = "none",
        on_fallback: Callable[[Fallback], None] = _ignore,
    ) -> None:
        """strategies: of `strategies_of`, made on this catalogue and these counters"""
        self.options = options
        self.catalogue = catalogue
        self.vocabulary = catalogue.vocabulary
        self.counters = counters
        self._on_fallback = on_fallback
        self._serving = self._generation(strategies, version)

    @classmethod
    def load(
        cls,
        folder: str | Path | None,
        options: PipelineOptions | None = None,
        on_fallback: Callable[[Fallback], None] = _ignore,
    ) -> "Pipeline":
        """Load an artifact; with None, only strategies without a model answer.

        Raises ArtifactError, DeviceError, StrategyError. on_fallback: called whenever a strategy fails on a batch
        """
        options = options or PipelineOptions()
        if folder is None:
            vocabulary = Vocabulary(max_items=options.max_items)
            context = StrategyContext(None, Catalogue(vocabulary), new_counters(options, vocabulary), options)
            return cls._from_context(context, on_fallback)
        from pipeline.artifact import load  # imports torch: seconds and 400 MiB, so only for a model

        artifact = load(Path(folder))
        artifact.check_schema(options.schema)
        vocabulary = Vocabulary(artifact.item_ids, options.max_items)
        counters = new_counters(options, vocabulary)
        counters.restore(artifact.counters)
        catalogue = Catalogue(vocabulary)
        artifact.load_into(catalogue)
        return cls._from_context(StrategyContext(artifact, catalogue, counters, options), on_fallback)

    @classmethod
    def _from_context(cls, context: StrategyContext, on_fallback: Callable[[Fallback], None]) -> "Pipeline":
        version = "none" if context.artifact is None else context.artifact.version
        strategies = strategies_of(context)
        try:
            check_own_strategies(strategies, context.catalogue.vocabulary, context.options.exclusion)
        except BaseException:
            close_all(strategies)
            raise
        return cls(context.options, context.catalogue, context.counters, strategies, version, on_fallback)

    @property
    def strategies(self) -> FallbackChain:
        """The strategies that serve now."""
        return self._serving.strategies

    @property
    def version(self) -> str:
        """The version of the model that serves now, "none" without one."""
        return self._serving.version

    def context(self, artifact: "Artifact") -> StrategyContext:
        """Return what the strategies of another artifact are made from, to serve in this process."""
        return StrategyContext(artifact, self.catalogue, self.counters, self.options)

    def recommend(
        self, histories: Sequence[Iterable[Event]], k: int = 10, strategy: str | None = None
    ) -> list[Recommendation]:
        """Return the k best items for each history (events of one user, any order); popular ones for an empty history.

        strategy: where to start in the fallback order; None: the best. Raises ValueError for an unknown strategy, an
        invalid k, or an event with an invalid field or an action that the schema does not have; then nothing stays.
        """
        check_k("recommend", k)
        self._check_strategy(strategy)
        events = checked_histories("recommend", histories, self.options.schema.actions)
        packed = Histories.from_events(events, self.options.schema)
        self._admit([event.item_id for history in events for event in history])
        result = self.rank(packed, k, strategy)
        return [Recommendation(items, *origin) for items, origin in zip(result.slates, result.origins, strict=True)]

    def rank(
        self, histories: Histories, k: int, strategy: str | None = None, deadline_s: float = math.inf
    ) -> BatchResult:
        """Return slates of at most k items: `prepare`, `launch` and `finish` at once.

        When a strategy raises, `on_fallback` gets the error, and the next strategy ranks the users for whom it raises;
        only the last one's error is raised. deadline_s: on time.monotonic's clock, when the slates are due
        Raises ValueError for an invalid k or an unknown strategy.
        """
        return self.finish(self.launch(self.prepare(Request(histories, k, deadline_s), strategy)))

    def prepare(self, request: Request, strategy: str | None = None) -> Ranking:
        """Begin a batch: the host's part before the device's. strategy: where to start in the fallback order.

        Every batch that begins must be finished, in the order of their beginnings; only `finish` raises a strategy's
        error. Tokens must keep their items until then: see Vocabulary.pinned. Raises ValueError for an invalid k or an
        unknown strategy.
        """
        check_k("rank", request.k)
        self._check_strategy(strategy)
        ranking = Ranking(request, self._serving, strategy)
        ranking.advance("prepare")
        return ranking

    def launch(self, ranking: Ranking) -> Ranking:
        """Start the device's part of a prepared batch; it does not wait for the device."""
        ranking.advance("launch")
        return ranking

    def finish(self, ranking: Ranking) -> BatchResult:
        """Wait for a launched batch and return its slates."""
        return BatchResult.from_parts(ranking.finish(self._slates), ranking.version)

    def swap(self, strategies: Sequence[Strategy], version: str) -> Generation:
        """Rank with these strategies from the next batch on, their breakers closed.

        Returns the generation that served so far, to be closed.
        strategies: of `strategies_of(self.context(artifact))`. Vocabulary and counters stay as they are.
        """
        replaced = self._serving
        self._serving = self._generation(strategies, version)
        replaced.retire()
        return replaced

    def close(self) -> None:
        """Close the strategies. No batch may be pending or follow. Raises the first of their errors."""
        for error in close_all(self.strategies):
            raise error

    def admit(self, item_ids: Iterable[str]) -> None:
        """Give the items of new events tokens, evicting others if needed; items that find no slot stay unknown.

        Raises ValueError for an invalid id.
        """
        self._admit(checked_ids("admit", item_ids))

    def load_items(self, items: Iterable[Item], delisted: Iterable[str] = ()) -> np.ndarray:
        """Load item records and delisted items, as found at the start or in a file; no item is in both.

        Features and the model use them from now on. Returns the tokens of the records, int64 [n]. Raises ValueError for
        an invalid record or id, and loads nothing then.
        """
        items = list(items)
        check_items("load_items", items)
        delisted = checked_ids("load_items", delisted)
        return self._load_items(items, delisted)

    def update_items(self, items: Iterable[Item], delisted: Iterable[str] = ()) -> None:
        """Apply live changes: as `load_items`, but items with a new record count as seen, evicting others if needed."""
        items = list(items)
        check_items("update_items", items)
        delisted = checked_ids("update_items", delisted)
        evict_for([item.item_id for item in items], self.catalogue, self.counters)
        self.vocabulary.touch(self._load_items(items, delisted))

    def observe(self, histories: Histories, is_new: np.ndarray) -> None:
        """Count the events that are new, bool [total events]: see Histories.from_rings_and_new."""
        check_new(histories, is_new)
        self.counters.observe(histories, is_new)

    def _admit(self, item_ids: Collection[str]) -> None:
        evict_for(item_ids, self.catalogue, self.counters)
        self.vocabulary.touch(self.vocabulary.admit(item_ids))

    def _load_items(self, items: Collection[Item], delisted: Collection[str]) -> np.ndarray:
        tokens = self.catalogue.upsert(items)
        self.catalogue.delist(delisted)
        return tokens

    def _slates(self, strategy: Strategy, request: Request, ranked: RankedItems) -> RankedSlates:
        """Return a strategy's answer as slates.

        Raises an error of any kind unless it is an answer: one of one's own is trusted with nothing.
        """
        start_s = time.perf_counter()
        if strategy.name not in FALLBACK_ORDER:
            check_answer(ranked, request, self.vocabulary)
        return RankedSlates.from_ranked(ranked, self.vocabulary.item_ids, start_s)

    def _generation(self, strategies: Sequence[Strategy], version: str) -> Generation:
        return Generation(FallbackChain(strategies, time.monotonic), version, self._on_fallback)

    def _check_strategy(self, strategy: str | None) -> None:
        if strategy is not None:
            self.strategies.check(strategy)
