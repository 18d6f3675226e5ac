"""The rankings that a replay compares its slates with: counters frozen as they were when the model was trained."""

from pathlib import Path

from pipeline.counters.counters import Counters, without_neighbours
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import frozen_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategy import rank
from worker.inference.ranker import PipelineRanker
from worker.replay.prequential import CUTOFF, Baseline, PrequentialEvaluator


def build_evaluator(ranker: PipelineRanker, artifact: str | None, score_from_ms: int) -> PrequentialEvaluator:
    """Return an evaluator with the artifact's counters as baselines; without an artifact it has none."""
    if artifact is None:
        return PrequentialEvaluator(ranker, {}, [], score_from_ms)
    from pipeline.artifact import load  # imports torch, so only when a model is configured

    pipeline = ranker.pipeline
    state = load(Path(artifact)).counters
    cooccurrence = frozen_counters(pipeline.options, pipeline.vocabulary, state)
    popularity = frozen_counters(pipeline.options, pipeline.vocabulary, without_neighbours(state))
    baselines = {
        "cooccurrence": _counters_baseline(pipeline, cooccurrence),
        "popularity": _counters_baseline(pipeline, popularity),
    }
    popular = [pipeline.vocabulary.item_ids[token] for token in popularity.popular(CUTOFF)[0]]
    return PrequentialEvaluator(ranker, baselines, popular, score_from_ms)


def _counters_baseline(pipeline: Pipeline, counters: Counters) -> Baseline:
    strategy = SimpleStrategy(counters, pipeline.options.exclusion)
    return lambda histories, k: rank(strategy, histories, k).tokens
