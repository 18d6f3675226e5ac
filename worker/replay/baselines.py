"""The rankings that a replay compares the slates with: counters as they were when the model was trained, frozen."""

from pathlib import Path

from pipeline.artifact import load
from pipeline.counters.counters import Counters, without_neighbours
from pipeline.serving.pipeline import Pipeline, frozen_counters
from pipeline.serving.simple_strategy import SimpleStrategy
from worker.inference.ranker import PipelineRanker
from worker.replay.prequential import TOP, Baseline, PrequentialEvaluator


def prequential_evaluator(ranker: PipelineRanker, artifact: str | None, from_ts_ms: int) -> PrequentialEvaluator:
    """With shadows where there is an artifact; else the slates are judged alone."""
    if artifact is None:
        return PrequentialEvaluator(ranker, {}, [], from_ts_ms)
    pipeline, state = ranker.pipeline, load(Path(artifact)).counters
    cooccurrence, popularity = (
        frozen_counters(pipeline.options, pipeline.vocabulary, counts) for counts in (state, without_neighbours(state))
    )
    shadows = {
        "cooccurrence": _frozen_baseline(pipeline, cooccurrence),
        "popularity": _frozen_baseline(pipeline, popularity),
    }
    popular = [pipeline.vocabulary.item_ids[token] for token in popularity.popular(TOP)[0]]
    return PrequentialEvaluator(ranker, shadows, popular, from_ts_ms)


def _frozen_baseline(pipeline: Pipeline, counters: Counters) -> Baseline:
    rung = SimpleStrategy(counters, pipeline.options.exclusion)
    return lambda histories, k: rung.rank(histories, k).tokens
