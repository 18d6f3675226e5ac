"""The contenders of the accuracy benchmark: each one's search space, and how it is fitted with drawn options.

A fit yields (epoch, function that builds the ranker) after every epoch; a contender without epochs yields once. Tuning
evaluates some of the epochs and keeps the best; the test stops at that epoch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from pipeline.backends.torch import resolve_device
from pipeline.data.event_log import EventLog
from pipeline.data.item_file import read_items
from pipeline.data.log_io import read_event_log
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import CatalogueScorer, FullRanking
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.popularity import Popularity, RecentPopularity
from pipeline.evaluation.ranking import Recommender, StrategyRecommender
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare
from pipeline.training.trainer import Trainer
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecScorer

Value = bool | str | int | float
Options = dict[str, Value]
Space = Mapping[str, tuple[Value, ...]]
Fits = Iterator[tuple[int, Callable[[], Recommender]]]

TRAINING: Space = {  # the same for both sequence models
    "trainer.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3),
    "trainer.weight_decay": (0.0, 0.01, 0.1),
    "trainer.epochs": (20, 40, 60),
    "trainer.crop_length": (64, 128, 200),
    "trainer.events_per_batch": (2048, 4096),
    "model.width": (64, 96, 128, 192, 256),
    "model.layers": (1, 2, 3, 4),
    "model.heads": (1, 2, 4, 8),
}
HSTU: Space = TRAINING | {
    "model.dropout": (0.1, 0.2, 0.3, 0.4, 0.5),
    "model.attention_dropout": (0.0, 0.2, 0.5, 0.7),
    "model.temperature": (0.07, 0.1, 0.15, 0.2),
    "contents": (False, True),  # item content: titles, genres, years of the films
}
SASREC: Space = TRAINING | {
    "model.dropout": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "model.loss": ("bce", "softmax"),
}
RECENT: Space = {"half_life_days": tuple(float(2**power) for power in range(-2, 10))}
COOCCURRENCE: Space = {
    "half_life_days": (7.0, 30.0, 90.0, 10_000.0),
    "neighbours": (32, 64, 128, 256),
    "window_events": (5, 10, 20),
}
ITEMKNN: Space = {
    "neighbours": (50, 100, 200, 400, 800),
    "shrinkage": (0.0, 1.0, 2.0, 5.0, 10.0, 20.0),
    "recency": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
# Ablations of the tuned HSTU: options that replace its own.
VARIANTS: dict[str, Options] = {
    "hstu, whole sequences": {"trainer.crop_length": 200},
    "hstu, no unknown items": {"trainer.unknown_item_rate": 0.0},
    "hstu, no attention dropout": {"model.attention_dropout": 0.0},
    "hstu, one layer": {"model.layers": 1},
    "hstu, no time bias": {"model.time_bias": False},
    "hstu, no contents": {"contents": False},
    "hstu, contents": {"contents": True},
    "hstu, no strength": {"model.strength": False},
    "hstu, sessions": {"model.recent_events": 100, "model.history_events": 400},
}


class Setting(msgspec.Struct, frozen=True):
    """Options shared by all contenders. users: number of first users, None for all; max_epochs: None for no limit."""

    log: Path
    leave_out: int = 10
    validation_last: int = 5
    users: int | None = None
    max_epochs: int | None = None
    ties_seed: int = 0
    device: str = "auto"

    def read(self) -> EventLog:
        """Read the log, with the events of one time in a random order per user.

        Half of the log's events share their predecessor's second, and the order of such events in the file says nothing
        about which was rated first.
        """
        log = read_event_log(self.log)
        tie_breaker = np.random.default_rng(self.ties_seed).random(len(log))
        log = log.select(np.lexsort((tie_breaker, log.ts_ms)))
        return log if self.users is None else log.select(log.users < self.users)

    def prepare(
        self, log: EventLog, trainer: Options | None = None, model: Options | None = None, content: bool = False
    ) -> TrainingSetup:
        """Split the log, with all validation events evaluated."""
        tree = {
            "trainer": trainer or {},
            "model": model or {},
            "leave_last_out": self.leave_out,
            "validation_last_out": self.validation_last,
            "max_validation_events": len(log) or 1,
        }
        items = read_items(self.log.with_suffix(".item")).items if content else ()
        return prepare(log, msgspec.convert(tree, TrainingOptions), PipelineOptions(device=self.device), items)


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

    def draw(self, trial: int) -> Options:
        """Return the trial's options, the same on every machine."""
        rng = np.random.default_rng([20260, trial])
        return {name: values[int(rng.integers(len(values)))] for name, values in self.space.items()}


def hstu(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    model = _strip_prefix("model.", options)
    d_head = int(model["width"]) // int(model["heads"])
    model |= {"d_qk": d_head, "d_v": d_head}
    setup = setting.prepare(log, _trainer_options(setting, options, seed), model, bool(options["contents"]))
    trainer = setup.trainer(_sequences(setup, full), setup.options.trainer.epochs)
    return setup, _epochs(trainer, lambda: StrategyRecommender(setup.ranker(trainer.weights())))


def sasrec(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log, _trainer_options(setting, options, seed))
    sequences = _sequences(setup, full)
    config = msgspec.convert(_strip_prefix("model.", options) | {"items": len(setup.vocabulary)}, SasRecConfig)
    device = resolve_device(setting.device)
    trainer = Trainer(lambda: SasRec(config), config.items, setup.options.trainer, setup.columns(sequences), device)
    popularity = Popularity(sequences, config.items)
    return setup, _epochs(trainer, lambda: _full_ranking(setup, SasRecScorer(trainer.model, popularity)))


def popularity(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    return _at_once(setup, Popularity(_sequences(setup, full), len(setup.vocabulary)))


def recent_popularity(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    half_life_days = float(options["half_life_days"])
    return _at_once(setup, RecentPopularity(_sequences(setup, full), len(setup.vocabulary), half_life_days))


def cooccurrence(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    sequences = _sequences(setup, full)
    counters = new_counters(msgspec.convert(options, PipelineOptions), setup.vocabulary)
    counters.observe(sequences.histories, sequences.histories.lengths)
    return setup, iter([(0, lambda: StrategyRecommender(SimpleStrategy(counters, setup.pipeline.exclusion)))])


def itemknn(setting: Setting, log: EventLog, full: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    knn_options = msgspec.convert(options, ItemKnnOptions)
    return _at_once(setup, ItemKnn.from_users(_sequences(setup, full), len(setup.vocabulary), knn_options))


CONTENDERS = {
    "hstu": Contender(HSTU, hstu),
    "sasrec": Contender(SASREC, sasrec),
    "popularity": Contender({}, popularity),
    "recent_popularity": Contender(RECENT, recent_popularity),
    "cooccurrence": Contender(COOCCURRENCE, cooccurrence),
    "itemknn": Contender(ITEMKNN, itemknn),
}
SEQUENCE_MODELS = ("hstu", "sasrec")  # trained with seeds and epochs


def _epochs(trainer: Trainer, ranker: Callable[[], Recommender]) -> Fits:
    for _ in range(trainer.options.epochs):
        trainer.train_epoch()
        yield trainer.epochs_done, ranker


def _sequences(setup: TrainingSetup, full: bool) -> UserSequences:
    """Return all training events, or those before the validation events."""
    return setup.train if full else setup.fit


def _at_once(setup: TrainingSetup, scorer: CatalogueScorer) -> tuple[TrainingSetup, Fits]:
    return setup, iter([(0, lambda: _full_ranking(setup, scorer))])


def _full_ranking(setup: TrainingSetup, scorer: CatalogueScorer) -> FullRanking:
    return FullRanking(scorer, setup.vocabulary, setup.pipeline.exclusion)


def _trainer_options(setting: Setting, options: Options, seed: int) -> Options:
    trainer = _strip_prefix("trainer.", options) | {"seed": seed}
    return trainer | {"epochs": min(int(trainer["epochs"]), setting.max_epochs or 1000)}


def _strip_prefix(prefix: str, options: Options) -> Options:
    """Return the options whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
