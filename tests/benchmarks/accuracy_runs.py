"""One trial and one test of the accuracy benchmark: what a worker process does, and the records it leaves."""

import time
from functools import cache

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import RankingMetrics, target_ranks
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.ranking import HeldOutEvents, evaluate_ranking, ranks_among, slates_of
from pipeline.training.preparation import TrainingSetup
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS, Options, Setting

CAP_EVENTS = 512
SLATE = 50
JUDGEMENTS = 12  # of a trial, at even distances
PATIENCE = 4  # judgements without a better NDCG before a trial ends
NEGATIVES = NegativeSampling(100, 0)


class Trial(msgspec.Struct, frozen=True):
    """epoch: the best one, 0 where there are none; measures: at 10, on the validation events."""

    model: str
    number: int
    options: Options
    epoch: int
    measures: RankingMetrics
    seconds: float
    hardware: str


class Outcome(msgspec.Struct, frozen=True):
    """ranks: by protocol, of each scored event, 0 = none; users: each event's."""

    model: str
    seed: int
    options: Options
    epoch: int
    ranks: dict[str, list[int]]
    users: list[int]
    seconds: float
    hardware: str


def trial_of(setting: Setting, model: str, number: int) -> Trial:
    """One trial: fitted before the validation events, judged on them."""
    start_s = time.monotonic()
    options = CONTENDERS[model].drawn(number)
    task, fits = CONTENDERS[model].fit(setting, log_of(setting), False, options, number)
    scored = HeldOutEvents(task.train, task.validation_events.positions, CAP_EVENTS)
    every = max(1, task.options.trainer.epochs // JUDGEMENTS)
    judged: list[tuple[int, RankingMetrics]] = []
    for epoch, ranker in fits:
        if epoch % every == 0:
            judged.append((epoch, evaluate_ranking(ranker(), scored, 10)))
        if len(judged) - _best(judged) > PATIENCE:
            break
    epoch, measures = judged[_best(judged)]
    return Trial(model, number, options, epoch, measures, time.monotonic() - start_s, hardware())


def outcome_of(setting: Setting, model: str, seed: int, options: Options, epoch: int, name: str) -> Outcome:
    """Trained on everything before the cut, up to that epoch of the trial's own schedule, as the trial was judged; the
    events behind the cut are ranked."""
    start_s, log = time.monotonic(), log_of(setting)
    task, fits = CONTENDERS[model].fit(setting, log, True, options, seed)
    ranker = next(ranker for done, ranker in fits if done == epoch)()
    scored = left_out(task, log)
    counts = np.bincount(task.train.tokens, minlength=len(task.vocabulary))
    negatives = sample_negatives(NEGATIVES, scored, counts)
    ranks = {
        "all items": target_ranks(slates_of(ranker, scored, SLATE), scored.targets).tolist(),
        str(NEGATIVES): ranks_among(ranker, scored, negatives).tolist(),
    }
    seconds = time.monotonic() - start_s
    return Outcome(name, seed, options, epoch, ranks, scored.users.tolist(), seconds, hardware())


def left_out(task: TrainingSetup, log: EventLog) -> HeldOutEvents:
    """The events behind the cut, in the whole log."""
    corpus = UserSequences.from_log(log, task.vocabulary)
    positions = np.flatnonzero(task.options.split.test_mask(log)[corpus.log_positions])
    return HeldOutEvents(corpus, positions, CAP_EVENTS)


def _best(judged: list[tuple[int, RankingMetrics]]) -> int:
    return max(range(len(judged)), key=lambda place: judged[place][1].ndcg, default=0)


@cache
def log_of(setting: Setting) -> EventLog:
    """Read once a process."""
    return setting.read()


@cache
def hardware() -> str:
    """Of the machine that this runs on; asked once a process."""
    return results.hardware()
