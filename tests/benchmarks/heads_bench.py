"""The simulated shop of the heads' benchmark: its log, its truth, and the models that are trained on it."""

from functools import cache, cached_property
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.data.sequences import UserSequences
from pipeline.data.split import Split
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.features.labels import TASKS, LabelRules, compute_log_labels
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.calibration import IDENTITY
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.rerank import RerankWeights
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.callbacks import SilentCallback

MAX_EVENTS = 512
WEIGHTINGS: dict[str, TrainerOptions] = {
    "fixed 1 1 1": TrainerOptions(),
    "uncertainty": TrainerOptions(weighting="uncertainty"),
    "dwa": TrainerOptions(weighting="dwa"),
    "fixed 0.3 0.3 0.3": TrainerOptions(head_weights=(0.3, 0.3, 0.3)),
    "fixed 2 0.5 0.5": TrainerOptions(head_weights=(2.0, 0.5, 0.5)),
    "fixed 0.5 2 0.5": TrainerOptions(head_weights=(0.5, 2.0, 0.5)),
    "fixed 0.5 0.5 2": TrainerOptions(head_weights=(0.5, 0.5, 2.0)),
}
RERANKS: dict[str, RerankWeights] = {
    "off": RerankWeights(),
    "engagement": RerankWeights(engagement=1.0),
    "retention": RerankWeights(retention=1.0),
    "monetization": RerankWeights(monetization=1.0),
    "money": RerankWeights(monetization=1.0, value=1.0),
    "all": RerankWeights(engagement=0.5, retention=0.5, monetization=0.5, value=0.5),
}


class Setting(msgspec.Struct, frozen=True):
    """Options shared by all processes. folder: of the trained models."""

    shop: SimulatorConfig
    epochs: int
    device: str
    folder: Path


class Bench:
    """One shop, its log, and the models trained on it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.pipeline = PipelineOptions(device=setting.device)
        self.simulator = Simulator(setting.shop)
        self.log, self.truth = warm_up(self.simulator, setting.shop.days)
        self.vocabulary = Vocabulary(self.log.item_ids)
        self.catalogue = Catalogue(self.vocabulary)
        self.catalogue.upsert(self.simulator.items())

    def path(self, weighting: str) -> Path:
        return self.setting.folder / weighting.replace(" ", "_")

    def train(self, weighting: str) -> None:
        trainer = replace(WEIGHTINGS[weighting], epochs=self.setting.epochs)
        options = TrainingOptions(trainer, HstuConfig(), patience=self.setting.epochs, refit=False)
        items = self.simulator.items()
        train(self.log, self.path(weighting), options, self.pipeline, SilentCallback(), "", items=items)

    def load(self, weighting: str) -> Artifact:
        return artifacts.load(self.path(weighting))

    def strategy(self, artifact: Artifact, rerank: RerankWeights = RERANKS["off"]) -> HstuStrategy:
        options = self.pipeline
        return load_hstu_strategy(artifact, self.catalogue, options.exclusion, options.device, options.threads, rerank)

    @cached_property
    def scored(self) -> HeldOutEvents:
        """The last 20 % of the events, except users' first ones."""
        sequences = UserSequences.from_log(self.log, self.vocabulary)
        held_out = Split().test_mask(self.log)[sequences.log_positions]
        has_history = sequences.starts < np.arange(len(sequences))
        return HeldOutEvents(sequences, np.flatnonzero(held_out & has_history), MAX_EVENTS)

    @cached_property
    def labels(self) -> np.ndarray:  # float32 [n, 3], of the scored events
        rules = LabelRules.from_options(EventSchema())
        return compute_log_labels(self.scored.sequences.histories, rules)[self.scored.positions - 1]


@cache
def get_bench(setting: Setting) -> Bench:
    """Build the shop once per process."""
    return Bench(setting)


def uncalibrated(artifact: Artifact) -> Artifact:
    weights = dict(artifact.weights) | {"heads.calibration": torch.tensor([IDENTITY] * len(TASKS))}
    return Artifact(artifact.manifest, weights, artifact.item_ids, artifact.counters, artifact.metadata)
