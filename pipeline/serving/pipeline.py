"""The pipeline: packed histories in, ranked items out, by the best strategy that can answer.

It is also a library:

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

from pipeline.backends.encoder import GraphOptions
from pipeline.counters.counters import Counters
from pipeline.errors import DeviceError
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories, Item, SlateItem, Why
from pipeline.serving.eviction import evict_for
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.rerank import RerankWeights
from pipeline.serving.simple_strategy import SimpleStrategy
from pipeline.serving.strategy import FALLBACK_ORDER, FallbackChain, RankedItems, Strategy

if TYPE_CHECKING:
    from pipeline.artifact import Artifact


class PipelineOptions(msgspec.Struct, frozen=True):
    """Options that serving, replay and evaluation must share."""

    schema: EventSchema = EventSchema()
    exclusion: Exclusion = Exclusion()
    rerank: RerankWeights = RerankWeights()
    half_life_days: float = 30.0
    neighbours: int = 64
    window_events: int = 10
    max_items: int = 1_000_000
    device: str = "auto"
    threads: int = 0
    graphs: GraphOptions | None = None  # kernels on a GPU, captured when a model is loaded; None: torch, in float32


class Recommendation(msgspec.Struct, frozen=True):
    """One user's ranked items, the strategy that ranked them, its backend, and why it was taken."""

    items: list[SlateItem]
    strategy: str
    backend: str
    why: Why


@dataclass(slots=True)
class BatchResult:
    """A batch's recommendations in the order of its users.

    slates: ranked items per user; ranked: the same as columns, with the milliseconds of the first two stages
    strategy, backend, why: see Recommendation
    rank_ms: the last stage's, from the strategy's retrieval to these slates
    """

    slates: list[list[SlateItem]]
    strategy: str
    backend: str
    why: Why
    ranked: RankedItems
    rank_ms: float


def _ignore(strategy: str, error: Exception) -> None:
    """Do nothing: a library's caller sees the strategy in the answer."""


class Pipeline:
    """Catalogue, counters and the chain of strategies. Not thread-safe: one thread ranks and observes."""

    def __init__(
        self,
        options: PipelineOptions,
        catalogue: Catalogue,
        counters: Counters,
        model: Strategy | None = None,
        version: str = "none",
        on_fallback: Callable[[str, Exception], None] = _ignore,
    ) -> None:
        self.options = options
        self.catalogue = catalogue
        self.vocabulary = catalogue.vocabulary
        self.counters = counters
        self.version = version
        self._simple = SimpleStrategy(counters, options.exclusion)
        self._on_fallback = on_fallback
        self.strategies = self._fallback_chain(model)

    @classmethod
    def load(
        cls,
        folder: str | Path | None,
        options: PipelineOptions | None = None,
        on_fallback: Callable[[str, Exception], None] = _ignore,
    ) -> "Pipeline":
        """Load an artifact; with None, only the simple strategy answers. Raises ArtifactError, DeviceError.

        on_fallback: called with a strategy's name and its error whenever the next strategy takes over
        """
        options = options or PipelineOptions()
        if folder is None:
            vocabulary = Vocabulary(max_items=options.max_items)
            return cls(options, Catalogue(vocabulary), new_counters(options, vocabulary), on_fallback=on_fallback)
        from pipeline.artifact import load  # imports torch: seconds and 400 MiB, so only for a model

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
        """Return the k best items for each history (events of one user, any order); popular ones for an empty history.

        strategy: where to start in FALLBACK_ORDER; None: the best. Raises ValueError for an unknown strategy, k < 1, or
        an action that the schema does not have.
        """
        histories = [list(history) for history in histories]
        self._check(histories, k, strategy)
        self.admit([event.item_id for history in histories for event in history])
        result = self.rank(Histories.from_events(histories, self.options.schema), k, strategy)
        return [Recommendation(items, result.strategy, result.backend, result.why) for items in result.slates]

    def rank(self, histories: Histories, k: int, strategy: str | None = None) -> BatchResult:
        """Return slates of at most k items.

        When a strategy raises, `on_fallback` gets the error and the next strategy ranks; only the last one's error is
        raised.
        """
        failure: Exception | None = None
        for candidate, why in self.strategies.candidates(strategy):
            try:
                ranked = candidate.rank(histories, k)
            except Exception as error:  # any failure of any stage: the chain must answer
                failure = error
                self.strategies.record_failure(candidate)
                self._on_fallback(candidate.name, error)
                continue
            self.strategies.record_success(candidate)
            return self._batch_result(candidate, why, ranked)
        raise failure or ValueError(f"no strategy at or after '{strategy}' in this process")

    def swap_model(self, model: Strategy, version: str) -> None:
        """Rank with this model from the next batch on, its breaker closed; vocabulary and counters stay as they are.

        model: made on this pipeline's catalogue (see `load_strategy`)
        """
        self.strategies = self._fallback_chain(model)
        self.version = version

    def admit(self, item_ids: Collection[str]) -> None:
        """Give the items of new events tokens, evicting others if needed; items that find no slot stay unknown."""
        evict_for(item_ids, self.catalogue, self.counters)
        self.vocabulary.touch(self.vocabulary.admit(item_ids))

    def load_items(self, items: Iterable[Item], delisted: Iterable[str] = ()) -> np.ndarray:
        """Load item records and delisted items, as found at the start or in a file; no item is in both.

        Features and the model use them from now on. Returns the tokens of the records, int64 [n].
        """
        tokens = self.catalogue.upsert(items)
        self.catalogue.delist(delisted)
        return tokens

    def update_items(self, items: Collection[Item], delisted: Iterable[str] = ()) -> None:
        """Apply live changes: as `load_items`, but items with a new record count as seen, evicting others if needed."""
        evict_for([item.item_id for item in items], self.catalogue, self.counters)
        self.vocabulary.touch(self.load_items(items, delisted))

    def observe(self, histories: Histories, new_counts: np.ndarray) -> None:
        """Count new events: the last new_counts[i] of user i's history (int64 [n])."""
        self.counters.observe(histories, new_counts)

    def _fallback_chain(self, model: Strategy | None) -> FallbackChain:
        strategies = [self._simple] if model is None else [model, self._simple]
        return FallbackChain({strategy.name: strategy for strategy in strategies}, time.monotonic)

    def _batch_result(self, strategy: Strategy, why: Why, ranked: RankedItems) -> BatchResult:
        start_s = time.perf_counter()
        slates = _slate_items(ranked, self.vocabulary.item_ids)
        rank_ms = ranked.rank_ms + 1e3 * (time.perf_counter() - start_s)
        return BatchResult(slates, strategy.name, strategy.backend, why, ranked, rank_ms)

    def _check(self, histories: list[list[Event]], k: int, strategy: str | None) -> None:
        if k < 1:
            raise ValueError(f"recommend: k = {k}, want at least 1")
        if strategy is not None and strategy not in FALLBACK_ORDER:
            raise ValueError(f"recommend: no strategy '{strategy}', want one of {', '.join(FALLBACK_ORDER)}")
        unknown = {event.action for history in histories for event in history} - set(self.options.schema.actions)
        if unknown:
            raise ValueError(f"recommend: unknown actions {sorted(unknown)}, want of {self.options.schema.actions}")


def load_strategy(artifact: "Artifact", catalogue: Catalogue, options: PipelineOptions) -> Strategy:
    """Return the artifact's model, warmed up, on a catalogue whose vocabulary has its items.

    ArtifactError when the vocabulary lacks one of them; DeviceError when the kernels do not run.
    """
    from pipeline.serving.hstu_strategy import load_hstu_strategy

    strategy = load_hstu_strategy(
        artifact,
        catalogue,
        options.exclusion,
        device=options.device,
        threads=options.threads,
        rerank=options.rerank,
        graphs=options.graphs,
    )
    if options.graphs is None or not strategy.on_gpu:
        return strategy
    try:
        strategy.warm(artifact.item_ids, options.graphs)
    except Exception as error:  # from a compiler, a driver, or for lack of memory
        reason = str(error).partition("\n")[0]
        raise DeviceError(
            f"pipeline.device '{options.device}': the kernels do not run on this card: {reason}; set"
            " pipeline.custom_kernels = false, or less pipeline.cuda_graph_mib if its memory is too small"
        ) from error
    return strategy


def new_counters(options: PipelineOptions, vocabulary: Vocabulary) -> Counters:
    return Counters(vocabulary, options.half_life_days, options.neighbours, options.window_events)


def frozen_counters(options: PipelineOptions, vocabulary: Vocabulary, state: Mapping[str, np.ndarray]) -> Counters:
    """Return counters as of the end of training that count nothing more: the baselines of every comparison."""
    counters = new_counters(options, vocabulary)
    counters.restore(state)
    counters.frozen = True
    return counters


def _slate_items(ranked: RankedItems, item_ids: list[str]) -> list[list[SlateItem]]:
    """Return the slates as Python objects: one `tolist` per column, one struct per item."""
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
