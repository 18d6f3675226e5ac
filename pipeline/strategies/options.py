"""Options of a pipeline, and the counters that they describe."""

from collections.abc import Mapping

import msgspec
import numpy as np

from pipeline.backends.encoder import GraphOptions
from pipeline.counters.counters import Counters
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EventSchema
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.rerank import RerankWeights
from pipeline.types import PositiveInt


class PipelineOptions(msgspec.Struct, frozen=True):
    """Options that serving, replay and evaluation must share."""

    schema: EventSchema = EventSchema()
    exclusion: Exclusion = Exclusion()
    ring_events: PositiveInt = 512  # of a user's ring, in training and evaluation: `sequences.max_events`
    rerank: RerankWeights = RerankWeights()
    half_life_days: float = 30.0
    neighbours: int = 64
    window_events: int = 10
    max_items: int = 1_000_000
    device: str = "auto"
    threads: int = 0
    graphs: GraphOptions | None = None  # kernels on a GPU, captured when a model is loaded; None: torch, in float32
    strategies: tuple[str, ...] = ()  # of one's own, "package.module:Class", best first; tried before the others


def new_counters(options: PipelineOptions, vocabulary: Vocabulary) -> Counters:
    return Counters(vocabulary, options.half_life_days, options.neighbours, options.window_events)


def frozen_counters(options: PipelineOptions, vocabulary: Vocabulary, state: Mapping[str, np.ndarray]) -> Counters:
    """Return counters as of the end of training that count nothing more: the baselines of every comparison."""
    counters = new_counters(options, vocabulary)
    counters.restore(state)
    counters.frozen = True
    return counters
