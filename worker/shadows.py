"""The rankings that a replay compares the slates with: counters as they were when the model was trained, frozen."""

from pathlib import Path

import numpy as np

from pipeline.artifact import load
from pipeline.counters import Counters
from pipeline.records import Histories
from pipeline.simple_rung import SimpleRung
from pipeline.unified import Pipeline, new_counters
from worker.ranker import Ranker
from worker.scoreboard import TOP, Scoreboard, Shadow


def scoreboard(ranker: Ranker, artifact: str | None, from_ts_ms: int) -> Scoreboard:
    """With shadows where there is an artifact; else the slates are judged alone."""
    if artifact is None:
        return Scoreboard(ranker, {}, [], from_ts_ms)
    pipeline, state = ranker.pipeline, load(Path(artifact)).counters
    # Without neighbours the same counter fills every row by popularity, under the same exclusion.
    alone = state | {name: state[name][:0] for name in ("neighbours", "weights")}
    alone |= {"offsets": np.zeros_like(state["offsets"])}
    popular = _frozen(pipeline, alone)
    shadows = {"co-occurrence": _shadow(pipeline, _frozen(pipeline, state)), "popularity": _shadow(pipeline, popular)}
    names = [pipeline.vocabulary.item_ids[token] for token in popular.popular(TOP)[0]]
    return Scoreboard(ranker, shadows, names, from_ts_ms)


def _frozen(pipeline: Pipeline, state: dict[str, np.ndarray]) -> Counters:
    counters = new_counters(pipeline.options, pipeline.vocabulary)
    counters.restore(state)
    counters.frozen = True
    return counters


def _shadow(pipeline: Pipeline, counters: Counters) -> Shadow:
    rung = SimpleRung(counters, pipeline.options.exclusion)
    return lambda histories, k: _tokens(rung, histories, k)


def _tokens(rung: SimpleRung, histories: Histories, k: int) -> np.ndarray:
    return rung.rank(histories, k).tokens
