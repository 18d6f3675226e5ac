"""The contenders of the accuracy benchmarks: how each is fitted on a log, with options drawn from its search space.

A fit yields (epoch, function that builds the ranker) after every epoch; a contender without epochs yields once. Tuning
evaluates some of the epochs and keeps the best; the test stops at that epoch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from pipeline.backends.torch import resolve_device
from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import CatalogueScorer, FullRanking
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.popularity import Popularity, RecentPopularity
from pipeline.evaluation.ranking import HeldOutEvents, Recommender, StrategyRecommender
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.training.preparation import TrainingSetup
from pipeline.training.trainer import Trainer
from tests.benchmarks.accuracy_setting import Options, Setting, Value
from tests.benchmarks.results import Cell
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecScorer

Space = Mapping[str, tuple[Value, ...]]

SMALL_SPACE = 64  # points; in such a space random draws would often repeat one


class CountingRanker(ABC):
    """A baseline that keeps counting: it ranks each event from all events of the log before it, also held-out ones."""

    @abstractmethod
    def slates(self, test: HeldOutEvents, k: int) -> np.ndarray:
        """Return int32 [n, k]: the k best items before each event, 0 where there is none."""


Ranker = Recommender | CountingRanker
Fits = Iterator[tuple[int, Callable[[], Ranker]]]


class Fit(Protocol):
    """Fits a contender, on all events before the split (full) or on those before the validation events."""

    def __call__(
        self, setting: Setting, log: EventLog, full: bool, options: Options, seed: int
    ) -> tuple[TrainingSetup, Fits]: ...


@dataclass(frozen=True)
class Contender:
    """A search space, and the fit that its options are for."""

    space: Space
    fit: Fit

    @property
    def is_trained(self) -> bool:
        """Whether it has epochs and seeds."""
        return "trainer.epochs" in self.space

    @property
    def size(self) -> int:
        """Number of different trials: the points of the space."""
        return prod(map(len, self.space.values()))

    def draw(self, trial: int) -> Options:
        """Return the trial's options, the same on every machine. A small space is drawn from without replacement."""
        if self.size <= SMALL_SPACE:
            point = int(np.random.default_rng(20260).permutation(self.size)[trial])
            chosen = np.unravel_index(point, tuple(map(len, self.space.values())))
            return {name: values[index] for (name, values), index in zip(self.space.items(), chosen, strict=True)}
        rng = np.random.default_rng([20260, trial])
        return {name: values[int(rng.integers(len(values)))] for name, values in self.space.items()}


class Gain(NamedTuple):
    """A question: by how much one ranking is better than another, relative to it, in a metric such as `ndcg10`."""

    name: str
    column: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Benchmark:
    """Contenders on one log, and the questions asked of them.

    name:      of the result file; protocol: which events are scored
    contenders, variants: by name; a variant is a contender's name and options that replace its tuned ones
    published: rows of published figures to show next to the measured ones
    """

    name: str
    protocol: str
    setting: Setting
    contenders: Mapping[str, Contender]
    gains: tuple[Gain, ...]
    variants: Mapping[str, tuple[str, Options]]
    published: tuple[dict[str, Cell], ...] = ()
    trials: int = 24
    seeds: int = 5


def hstu(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    model = _strip_prefix("model.", options)
    d_head = _integer(model["width"]) // _integer(model["heads"])
    model |= {"d_qk": d_head, "d_v": d_head}
    setup = setting.prepare(log, _trainer_options(setting, options, seed), model, bool(options["contents"]))
    trainer = setup.trainer(fit_sequences(setup, full), setup.options.trainer.epochs)
    return setup, _epochs(trainer, lambda: StrategyRecommender(setup.ranker(trainer.weights())))


def sasrec(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log, _trainer_options(setting, options, seed))
    sequences = fit_sequences(setup, full)
    config = msgspec.convert(_strip_prefix("model.", options) | {"items": len(setup.vocabulary)}, SasRecConfig)
    positions = min(config.max_events, setup.options.trainer.crop_length)  # no crop trains a later one
    config = msgspec.structs.replace(config, max_events=positions)
    device = resolve_device(setting.device)
    trainer = Trainer(lambda: SasRec(config), config.items, setup.options.trainer, setup.columns(sequences), device)
    popularity = Popularity(sequences, config.items)
    return setup, _epochs(trainer, lambda: _full_ranking(setup, SasRecScorer(trainer.model, popularity)))


def popularity(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    return at_once(setup, Popularity(fit_sequences(setup, full), len(setup.vocabulary)))


def recent_popularity(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    half_life_days = msgspec.convert(options["half_life_days"], float)
    return at_once(setup, RecentPopularity(fit_sequences(setup, full), len(setup.vocabulary), half_life_days))


def cooccurrence(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    sequences = fit_sequences(setup, full)
    counters = new_counters(msgspec.convert(options, PipelineOptions), setup.vocabulary)
    counters.observe(sequences.histories, np.ones(len(sequences.histories.events), bool))
    return setup, iter([(0, lambda: StrategyRecommender(SimpleStrategy(counters, setup.pipeline.exclusion)))])


def itemknn(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    knn_options = msgspec.convert(options, ItemKnnOptions)
    return at_once(setup, ItemKnn.from_users(fit_sequences(setup, full), len(setup.vocabulary), knn_options))


def _epochs(trainer: Trainer, ranker: Callable[[], Ranker]) -> Fits:
    for _ in range(trainer.options.epochs):
        trainer.train_epoch()
        yield trainer.epochs_done, ranker


def fit_sequences(setup: TrainingSetup, full: bool) -> UserSequences:
    """Return all training events, or those before the validation events."""
    return setup.train if full else setup.fit


def at_once(setup: TrainingSetup, scorer: CatalogueScorer) -> tuple[TrainingSetup, Fits]:
    return setup, iter([(0, lambda: _full_ranking(setup, scorer))])


def _full_ranking(setup: TrainingSetup, scorer: CatalogueScorer) -> FullRanking:
    return FullRanking(scorer, setup.vocabulary, setup.pipeline.exclusion)


def _trainer_options(setting: Setting, options: Options, seed: int) -> Options:
    trainer = _strip_prefix("trainer.", options) | {"seed": seed}
    epochs = _integer(trainer["epochs"])
    return trainer | {"epochs": min(epochs, setting.max_epochs or epochs)}


def _integer(value: Value) -> int:
    return msgspec.convert(value, int)


def _strip_prefix(prefix: str, options: Options) -> Options:
    """Return the options whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
