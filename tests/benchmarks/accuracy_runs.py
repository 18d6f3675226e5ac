"""One trial and one test of the accuracy benchmark, as a worker process runs them, and their records."""

import time
from functools import cache

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import RankingMetrics, target_ranks
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.ranking import HeldOutEvents, evaluate_ranking, rank_among_negatives, recommend_slates
from pipeline.training.preparation import TrainingSetup
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS, Options, Setting

MAX_EVENTS = 512
SLATE_SIZE = 50
EVALUATIONS = 12  # per trial, evenly spaced
PATIENCE = 4  # evaluations without a better NDCG before a trial ends
NEGATIVES = NegativeSampling(100, 0)


class Trial(msgspec.Struct, frozen=True):
    """Result of a trial. epoch: the best one, 0 for a contender without epochs; metrics: at 10, on the validation
    events."""

    model: str
    number: int
    options: Options
    epoch: int
    metrics: RankingMetrics
    seconds: float
    hardware: str


class Outcome(msgspec.Struct, frozen=True):
    """Result of a test. ranks: by protocol, per scored event, 0 = not ranked; users: per scored event."""

    model: str
    seed: int
    options: Options
    epoch: int
    ranks: dict[str, list[int]]
    users: list[int]
    seconds: float
    hardware: str


def run_trial(setting: Setting, model: str, number: int) -> Trial:
    """Fit on the events before the validation events, and evaluate on those."""
    start_s = time.monotonic()
    options = CONTENDERS[model].draw(number)
    setup, fits = CONTENDERS[model].fit(setting, read_log(setting), False, options, number)
    scored = HeldOutEvents(setup.train, setup.validation_events.positions, MAX_EVENTS)
    every = max(1, setup.options.trainer.epochs // EVALUATIONS)
    evaluated: list[tuple[int, RankingMetrics]] = []
    for epoch, build_ranker in fits:
        if epoch % every == 0:
            evaluated.append((epoch, evaluate_ranking(build_ranker(), scored, 10)))
        if len(evaluated) - _best(evaluated) > PATIENCE:
            break
    epoch, metrics = evaluated[_best(evaluated)]
    return Trial(model, number, options, epoch, metrics, time.monotonic() - start_s, hardware())


def run_test(setting: Setting, model: str, seed: int, options: Options, epoch: int, name: str) -> Outcome:
    """Train on all events before the split, up to this epoch of the trial's schedule, and rank the held-out ones."""
    start_s = time.monotonic()
    log = read_log(setting)
    setup, fits = CONTENDERS[model].fit(setting, log, True, options, seed)
    ranker = next(build_ranker for done, build_ranker in fits if done == epoch)()
    scored = held_out_events(setup, log)
    counts = np.bincount(setup.train.tokens, minlength=len(setup.vocabulary))
    negatives = sample_negatives(NEGATIVES, scored, counts)
    ranks = {
        "all items": target_ranks(recommend_slates(ranker, scored, SLATE_SIZE), scored.targets).tolist(),
        str(NEGATIVES): rank_among_negatives(ranker, scored, negatives).tolist(),
    }
    seconds = time.monotonic() - start_s
    return Outcome(name, seed, options, epoch, ranks, scored.users.tolist(), seconds, hardware())


def held_out_events(setup: TrainingSetup, log: EventLog) -> HeldOutEvents:
    """Return the events after the split, with all events of the log as histories."""
    sequences = UserSequences.from_log(log, setup.vocabulary)
    positions = np.flatnonzero(setup.options.split.test_mask(log)[sequences.log_positions])
    return HeldOutEvents(sequences, positions, MAX_EVENTS)


def _best(evaluated: list[tuple[int, RankingMetrics]]) -> int:
    return max(range(len(evaluated)), key=lambda index: evaluated[index][1].ndcg, default=0)


@cache
def read_log(setting: Setting) -> EventLog:
    """Read the log once per process."""
    return setting.read()


@cache
def hardware() -> str:
    """Describe this machine, once per process."""
    return results.hardware()
