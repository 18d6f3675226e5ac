"""One trial and one test of an accuracy benchmark, as a worker process runs them, and their records."""

import time
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import RankingMetrics, ranking_metrics, target_ranks
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.ranking import HeldOutEvents, rank_among_negatives, recommend_slates
from pipeline.training.preparation import TrainingSetup
from tests.benchmarks.accuracy_models import Contender, CountingRanker, Ranker
from tests.benchmarks.accuracy_setting import Options, Setting
from tests.benchmarks.results import Stage

SLATE_SIZE = 50
PATIENCE = 4  # evaluations without a better NDCG before a trial ends
NEGATIVES = NegativeSampling(100, 0)
ALL_ITEMS = "all items"


class Trial(msgspec.Struct, frozen=True):
    """Result of a trial. epoch: the best one, 0 for a contender without epochs; metrics: at 10, on the validation
    events."""

    model: str
    number: int
    options: Options
    epoch: int
    metrics: RankingMetrics
    seconds: float
    stage: Stage


class Outcome(msgspec.Struct, frozen=True):
    """Result of a test, per scored event.

    ranks: by candidates, 0 = not ranked; users: the event's user; is_tied, is_sampled: see ScoredEvents
    """

    model: str
    seed: int
    options: Options
    epoch: int
    ranks: dict[str, list[int]]
    users: list[int]
    is_tied: list[bool]
    is_sampled: list[bool]
    seconds: float
    stage: Stage


@dataclass(slots=True)
class ScoredEvents:
    """Held-out events to score.

    is_tied:    bool [n], the event has the time of its user's previous event, so the order of the two means nothing
    is_sampled: bool [n], drawn from all held-out events; the others are further untied ones, where those are rare
    """

    test: HeldOutEvents
    is_tied: np.ndarray
    is_sampled: np.ndarray

    @classmethod
    def draw(cls, test: HeldOutEvents, count: int | None) -> "ScoredEvents":
        """Draw `count` events, the same ones for all contenders, and as many untied ones as half of that."""
        is_tied = test.is_tied
        if count is None or len(test) <= count:
            return cls(test, is_tied, np.ones(len(test), bool))
        order = np.random.default_rng(0).permutation(len(test))
        drawn = order[:count]
        untied = order[~is_tied[order]][: count // 2]
        kept = np.union1d(drawn, untied)
        events = HeldOutEvents(test.sequences, test.positions[kept], test.max_events)
        return cls(events, is_tied[kept], np.isin(kept, drawn))


def run_trial(setting: Setting, model: str, contender: Contender, number: int, stage: Stage) -> Trial:
    """Fit on the events before the validation events, and evaluate on those."""
    start_s = time.monotonic()
    options = contender.draw(number)
    setup, fits = contender.fit(setting, read_log(setting), False, options, number)
    scored = HeldOutEvents(setup.train, setup.validation_events.positions, setting.max_events)
    epochs = setup.options.trainer.epochs
    every = -(-epochs // setting.evaluations)
    evaluated: list[tuple[int, RankingMetrics]] = []
    for epoch, build_ranker in fits:
        if epoch % every == 0 or epoch == epochs or not epoch:
            ranks = target_ranks(make_slates(build_ranker(), scored, 10), scored.targets)
            evaluated.append((epoch, ranking_metrics(ranks, 10)))
        if len(evaluated) - _best(evaluated) > PATIENCE:
            break
    epoch, metrics = evaluated[_best(evaluated)]
    return Trial(model, number, options, epoch, metrics, time.monotonic() - start_s, stage)


def run_test(
    setting: Setting, model: str, contender: Contender, seed: int, options: Options, epoch: int, stage: Stage
) -> Outcome:
    """Train on all events before the split, up to this epoch of the trial's schedule, and rank the held-out ones."""
    start_s = time.monotonic()
    log = read_log(setting)
    setup, fits = contender.fit(setting, log, True, options, seed)
    ranker = next(build_ranker for done, build_ranker in fits if done == epoch)()
    scored = held_out_events(setting, setup, log)
    return Outcome(
        model=model,
        seed=seed,
        options=options,
        epoch=epoch,
        ranks=_ranks(setting, setup, ranker, scored.test),
        users=scored.test.users.tolist(),
        is_tied=scored.is_tied.tolist(),
        is_sampled=scored.is_sampled.tolist(),
        seconds=time.monotonic() - start_s,
        stage=stage,
    )


def held_out_events(setting: Setting, setup: TrainingSetup, log: EventLog) -> ScoredEvents:
    """Return the scored events after the split, with all events of the log as histories."""
    sequences = UserSequences.from_log(log, setup.vocabulary)
    positions = np.flatnonzero(setup.options.split.test_mask(log)[sequences.log_positions])
    return ScoredEvents.draw(HeldOutEvents(sequences, positions, setting.max_events), setting.max_scored_events)


def make_slates(ranker: Ranker, test: HeldOutEvents, k: int) -> np.ndarray:
    """Return int32 [n, k]: the k best items before each event, 0 where there is none."""
    if isinstance(ranker, CountingRanker):
        return ranker.slates(test, k)
    return recommend_slates(ranker, test, k)


def _ranks(setting: Setting, setup: TrainingSetup, ranker: Ranker, test: HeldOutEvents) -> dict[str, list[int]]:
    """Return the ranks of the events' items by the name of the candidates."""
    ranks = {ALL_ITEMS: target_ranks(make_slates(ranker, test, SLATE_SIZE), test.targets).tolist()}
    if setting.negatives and not isinstance(ranker, CountingRanker):
        counts = np.bincount(setup.train.tokens, minlength=len(setup.vocabulary))
        negatives = sample_negatives(NEGATIVES, test, counts)
        ranks[str(NEGATIVES)] = rank_among_negatives(ranker, test, negatives).tolist()
    return ranks


def _best(evaluated: list[tuple[int, RankingMetrics]]) -> int:
    return max(range(len(evaluated)), key=lambda index: evaluated[index][1].ndcg, default=0)


@cache
def read_log(setting: Setting) -> EventLog:
    """Read the log once per process."""
    return setting.read()
