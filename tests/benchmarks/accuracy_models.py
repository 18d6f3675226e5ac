"""Who competes in the accuracy benchmark: each contender's search space, and how it is fitted with drawn options.

A fit yields (epoch, make a ranker of it) after every epoch; what has no epochs yields once. So tuning judges some of
them and keeps the best, and the test stops at that epoch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from pipeline.backends.torch import resolve_device
from pipeline.data.event_log import EventLog
from pipeline.data.item_file import read_items
from pipeline.data.log_io import read_event_log
from pipeline.evaluation.full_ranking import CatalogueScorer, FullRanking
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.popularity import Popularity, RecentPopularity
from pipeline.evaluation.ranking import Recommender
from pipeline.serving.pipeline import PipelineOptions, new_counters
from pipeline.serving.simple_strategy import SimpleStrategy
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
    "contents": (False, True),  # of the films: titles, genres, years
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
# What of the tuned HSTU is worth how much: options that replace its own.
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
    """What all contenders share. users: the first ones, None keeps all; max_epochs: None as drawn."""

    log: Path
    leave_out: int = 10
    validation_last: int = 5
    users: int | None = None
    max_epochs: int | None = None
    ties_seed: int = 0
    device: str = "auto"

    def read(self) -> EventLog:
        """Half of the log's events share their predecessor's second. Events of one time go in an order drawn for each
        user: sorted by item, as logs are read, a model could learn which items the next one is not."""
        log = read_event_log(self.log)
        drawn = np.random.default_rng(self.ties_seed).random(len(log))
        log = log.select(np.lexsort((drawn, log.ts_ms)))
        return log if self.users is None else log.select(log.users < self.users)

    def task(
        self, log: EventLog, trainer: Options | None = None, model: Options | None = None, contents: bool = False
    ) -> TrainingSetup:
        """Cut, with all validation events judged."""
        tree = {
            "trainer": trainer or {}, "model": model or {}, "leave_last_out": self.leave_out,
            "validation_last_out": self.validation_last, "max_validation_events": len(log) or 1,
        }  # fmt: skip
        items = read_items(self.log.with_suffix(".item")) if contents else ()
        return prepare(log, msgspec.convert(tree, TrainingOptions), PipelineOptions(device=self.device), items)


@dataclass(frozen=True)
class Contender:
    """fit(setting, log, whether on all events before the cut or on those before the validation, options, seed)."""

    space: Space
    fit: Callable[[Setting, EventLog, bool, Options, int], tuple[TrainingSetup, Fits]]

    def drawn(self, trial: int) -> Options:
        """Trial `trial`'s options, the same on every machine."""
        random = np.random.default_rng([20260, trial])
        return {name: values[int(random.integers(len(values)))] for name, values in self.space.items()}


def hstu(setting: Setting, log: EventLog, whole: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    model = _below("model.", options)
    model["d_qk"] = model["d_v"] = int(model["width"]) // int(model["heads"])
    task = setting.task(log, _trainer_options(setting, options, seed), model, bool(options["contents"]))
    trainer = task.trainer(task.train if whole else task.fit, task.options.trainer.epochs)
    return task, _epochs(trainer, lambda: task.ranker(trainer.weights()))


def sasrec(setting: Setting, log: EventLog, whole: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    task = setting.task(log, _trainer_options(setting, options, seed))
    corpus = task.train if whole else task.fit
    config = msgspec.convert(_below("model.", options) | {"items": len(task.vocabulary)}, SasRecConfig)
    device = resolve_device(setting.device)
    trainer = Trainer(lambda: SasRec(config), config.items, task.options.trainer, task.columns(corpus), device)
    popularity = Popularity(corpus, config.items)
    return task, _epochs(trainer, lambda: _catalogue(task, SasRecScorer(trainer.model, popularity)))


def popularity(setting: Setting, log: EventLog, whole: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    task = setting.task(log)
    return _at_once(task, Popularity(task.train if whole else task.fit, len(task.vocabulary)))


def recent_popularity(
    setting: Setting, log: EventLog, whole: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    task = setting.task(log)
    corpus = task.train if whole else task.fit
    return _at_once(task, RecentPopularity(corpus, len(task.vocabulary), float(options["half_life_days"])))


def cooccurrence(
    setting: Setting, log: EventLog, whole: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    task = setting.task(log)
    corpus = task.train if whole else task.fit
    counters = new_counters(msgspec.convert(options, PipelineOptions), task.vocabulary)
    counters.observe(corpus.histories, corpus.histories.lengths)
    return task, iter([(0, lambda: SimpleStrategy(counters, task.pipeline.exclusion))])


def itemknn(setting: Setting, log: EventLog, whole: bool, options: Options, seed: int) -> tuple[TrainingSetup, Fits]:
    task = setting.task(log)
    corpus = task.train if whole else task.fit
    return _at_once(task, ItemKnn.from_users(corpus, len(task.vocabulary), msgspec.convert(options, ItemKnnOptions)))


CONTENDERS = {
    "hstu": Contender(HSTU, hstu),
    "sasrec": Contender(SASREC, sasrec),
    "popularity": Contender({}, popularity),
    "recent_popularity": Contender(RECENT, recent_popularity),
    "cooccurrence": Contender(COOCCURRENCE, cooccurrence),
    "itemknn": Contender(ITEMKNN, itemknn),
}
TRAINED = ("hstu", "sasrec")  # by seeds, with epochs


def _epochs(trainer: Trainer, ranker: Callable[[], Recommender]) -> Fits:
    for _ in range(trainer.options.epochs):
        trainer.train_epoch()
        yield trainer.epochs_done, ranker


def _at_once(task: TrainingSetup, scorer: CatalogueScorer) -> tuple[TrainingSetup, Fits]:
    return task, iter([(0, lambda: _catalogue(task, scorer))])


def _catalogue(task: TrainingSetup, scorer: CatalogueScorer) -> FullRanking:
    return FullRanking(scorer, task.vocabulary, task.pipeline.exclusion)


def _trainer_options(setting: Setting, options: Options, seed: int) -> Options:
    trainer = _below("trainer.", options) | {"seed": seed}
    return trainer | {"epochs": min(int(trainer["epochs"]), setting.max_epochs or 1000)}


def _below(prefix: str, options: Options) -> Options:
    return {name.removeprefix(prefix): value for name, value in options.items() if name.startswith(prefix)}
