"""The pipeline: packed histories in, ranked items out, by the best rung that can answer.

It is a library too:

    pipeline = Pipeline.load("artifact")
    for slate in pipeline.recommend([[Event("u1", "i7", "view", 1_700_000_000_000)]], k=10):
        print(slate.strategy, [item.item_id for item in slate.items])
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pipeline.backends import GraphOptions
from pipeline.counters.counters import Counters
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories, Item, SlateItem
from pipeline.serving.eviction import evict_for
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.rerank import RerankWeights
from pipeline.serving.simple_strategy import SimpleStrategy
from pipeline.serving.strategy import FALLBACK_ORDER, FallbackChain, RankedItems, Strategy

if TYPE_CHECKING:
    from pipeline.artifact import Artifact


class PipelineOptions(msgspec.Struct, frozen=True):
    """What serving, replay and evaluation must agree on."""

    schema: EventSchema = EventSchema()
    exclusion: Exclusion = Exclusion()
    rerank: RerankWeights = RerankWeights()
    half_life_days: float = 30.0
    neighbours: int = 64
    window_events: int = 10
    max_items: int = 1_000_000
    device: str = "auto"
    threads: int = 0
    graphs: GraphOptions | None = None  # of the kernels on a GPU, made when a model is loaded; None: torch, in float32


class Recommendation(msgspec.Struct, frozen=True):
    """One user's ranked items and the rung that ranked them."""

    items: list[SlateItem]
    strategy: str


@dataclass(slots=True)
class BatchResult:
    """A batch's recommendations, in the order of its users, with the milliseconds the batch took by stage.

    ranked: the same as columns
    """

    slates: list[list[SlateItem]]
    strategy: str
    ranked: RankedItems
    features_ms: float
    encode_ms: float
    rank_ms: float


def _ignore(rung: str, error: Exception) -> None:
    """A library's caller sees the rung in the answer."""


class Pipeline:
    """Catalogue, counters and the ladder of rungs. Not thread-safe: one thread ranks and observes."""

    def __init__(
        self,
        options: PipelineOptions,
        catalogue: Catalogue,
        counters: Counters,
        model: Strategy | None = None,
        version: str = "none",
        on_fallback: Callable[[str, Exception], None] = _ignore,
    ) -> None:
        self.options, self.counters, self.version = options, counters, version
        self.catalogue, self.vocabulary = catalogue, catalogue.vocabulary
        self._simple, self._on_fallback = SimpleStrategy(counters, options.exclusion), on_fallback
        self.strategies = self._fallback_chain(model)

    @classmethod
    def load(
        cls,
        folder: str | Path | None,
        options: PipelineOptions | None = None,
        on_fallback: Callable[[str, Exception], None] = _ignore,
    ) -> "Pipeline":
        """From an artifact, or without one: then the simple rung answers alone. Raises ArtifactError."""
        options = options or PipelineOptions()
        if folder is None:
            vocabulary = Vocabulary(max_items=options.max_items)
            return cls(options, Catalogue(vocabulary), new_counters(options, vocabulary), on_fallback=on_fallback)
        from pipeline.artifact import load  # torch costs seconds and 400 MiB: only who has a model pays

        artifact = load(Path(folder))
        artifact.check_schema(options.schema)
        vocabulary = Vocabulary(artifact.item_ids, options.max_items)
        counters = new_counters(options, vocabulary)
        counters.restore(artifact.counters)
        catalogue = Catalogue(vocabulary)
        artifact.load_into(catalogue)
        model = load_strategy(artifact, catalogue, options)
        return cls(options, catalogue, counters, model, artifact.version, on_fallback)

    def recommend(
        self, histories: Sequence[Iterable[Event]], k: int = 10, strategy: str | None = None
    ) -> list[Recommendation]:
        """The k best items for each history (events of one user, any order); an empty history gets the popular ones.

        strategy: the rung to start at (see strategy.LADDER); None: the best. Raises ValueError for an unknown rung,
        k < 1, or an action that the schema does not have.
        """
        histories = [list(history) for history in histories]
        self._check(histories, k, strategy)
        self.admit([event.item_id for history in histories for event in history])
        answer = self.rank(Histories.from_events(histories, self.options.schema), k, strategy)
        return [Recommendation(items, answer.strategy) for items in answer.slates]

    def rank(self, histories: Histories, k: int, strategy: str | None = None) -> BatchResult:
        """The batch's rows of at most k items. What a rung raises is reported to `on_fallback`, the next one answers;
        only the last rung's error is raised."""
        failure: Exception | None = None
        for rung in self.strategies.candidates(strategy):
            try:
                ranked = rung.rank(histories, k)
            except Exception as error:  # any failure of a stage: the ladder's promise is an answer
                failure = error
                self.strategies.record_failure(rung)
                self._on_fallback(rung.name, error)
                continue
            self.strategies.record_success(rung)
            return self._batch_result(rung, ranked)
        raise failure or ValueError(f"no rung at or below '{strategy}' in this process")

    def swap_model(self, model: Strategy, version: str) -> None:
        """From the next batch on this model ranks, its breaker closed; vocabulary and counters stay as they are.

        model: made on this pipeline's catalogue (see `rung_of`).
        """
        self.strategies, self.version = self._fallback_chain(model), version

    def admit(self, item_ids: Collection[str]) -> None:
        """The items of new events have tokens from now on; what finds no room, nor whom to retire, stays unknown."""
        evict_for(item_ids, self.catalogue, self.counters)
        self.vocabulary.touch(self.vocabulary.admit(item_ids))

    def load_items(self, items: Iterable[Item], delisted: Iterable[str] = ()) -> np.ndarray:
        """Records of items, and items that nobody may be shown any more, as a process finds them at its start or in a
        file: what features and the model know from now on. An item is in one of both. Returns the tokens, int64 [n]."""
        tokens = self.catalogue.upsert(items)
        self.catalogue.delist(delisted)
        return tokens

    def update_items(self, items: Collection[Item], delisted: Iterable[str] = ()) -> None:
        """The same as news: an item that has just got a record is alive, and room is made for it."""
        evict_for([item.item_id for item in items], self.catalogue, self.counters)
        self.vocabulary.touch(self.load_items(items, delisted))

    def observe(self, histories: Histories, fresh: np.ndarray) -> None:
        """Count new events: the last fresh[i] of user i's history (int64 [n])."""
        self.counters.observe(histories, fresh)

    def popular(self, k: int) -> list[SlateItem]:
        """The k most popular items: the answer for a user without events."""
        ids = self.vocabulary.item_ids
        shares = zip(*(column.tolist() for column in self.counters.popular(k)), strict=True)
        return [SlateItem(ids[token], share, None, None, None, "popular") for token, share in shares]

    def _fallback_chain(self, model: Strategy | None) -> FallbackChain:
        rungs = [self._simple] if model is None else [model, self._simple]
        return FallbackChain({rung.name: rung for rung in rungs}, time.monotonic)

    def _batch_result(self, rung: Strategy, ranked: RankedItems) -> BatchResult:
        start = time.perf_counter()
        rows = _slate_items(ranked, self.vocabulary.item_ids)
        rank_ms = ranked.rank_ms + 1e3 * (time.perf_counter() - start)
        return BatchResult(rows, rung.name, ranked, ranked.features_ms, ranked.encode_ms, rank_ms)

    def _check(self, histories: list[list[Event]], k: int, strategy: str | None) -> None:
        if k < 1:
            raise ValueError(f"recommend: k = {k}, want at least 1")
        if strategy is not None and strategy not in FALLBACK_ORDER:
            raise ValueError(f"recommend: no rung '{strategy}', want one of {', '.join(FALLBACK_ORDER)}")
        unknown = {event.action for history in histories for event in history} - set(self.options.schema.actions)
        if unknown:
            raise ValueError(f"recommend: unknown actions {sorted(unknown)}, want of {self.options.schema.actions}")


def load_strategy(artifact: "Artifact", catalogue: Catalogue, options: PipelineOptions) -> Strategy:
    """The artifact's model on a catalogue whose vocabulary has its items; ArtifactError where it had no room."""
    from pipeline.serving.hstu_strategy import HstuStrategy

    basics = (options.exclusion, options.device, options.threads, options.rerank)
    rung = HstuStrategy(artifact, catalogue, *basics, options.graphs)
    rung.warm(artifact.item_ids)
    return rung


def new_counters(options: PipelineOptions, vocabulary: Vocabulary) -> Counters:
    return Counters(vocabulary, options.half_life_days, options.neighbours, options.window_events)


def frozen_counters(options: PipelineOptions, vocabulary: Vocabulary, state: Mapping[str, np.ndarray]) -> Counters:
    """As they were at the end of training; what comes later is not counted: the baselines of every comparison."""
    counters = new_counters(options, vocabulary)
    counters.restore(state)
    counters.frozen = True
    return counters


def _slate_items(ranked: RankedItems, item_ids: list[str]) -> list[list[SlateItem]]:
    """Python objects at the very end: one `tolist` a column, one struct an item."""
    n, k = ranked.tokens.shape
    tokens = ranked.tokens.tolist()
    scores = np.round(ranked.scores.astype(np.float64), 5).tolist()
    sources = ranked.source.tolist() if isinstance(ranked.source, np.ndarray) else [[ranked.source] * k] * n
    if ranked.heads is None:
        heads = [[(None, None, None)] * k] * n
    else:
        heads = np.round(ranked.heads.astype(np.float64), 5).tolist()
    return [
        [
            SlateItem(item_ids[token], score, head[0], head[1], head[2], source)
            for token, score, head, source in zip(*row, strict=True)
            if token
        ]
        for row in zip(tokens, scores, heads, sources, strict=True)
    ]
