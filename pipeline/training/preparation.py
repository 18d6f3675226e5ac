"""Prepares a log for training: splits it, maps items to tokens, counts, labels, and builds its trainers."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.backends.torch import resolve_device
from pipeline.counters.counters import Counters
from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.data.split import DEFAULT_TRAIN_FRACTION, Split, TrainingProvenance
from pipeline.errors import TrainingError
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.features.item_values import item_values
from pipeline.features.labels import LabelOptions, LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Item
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.training.batches import TrainingColumns
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.trainer import Trainer, TrainerOptions
from pipeline.training.warm_start import WarmStart
from pipeline.types import Fraction, NonNegativeInt, PositiveInt


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of `millrace train`.

    The split is by events in time order, or, with `leave_last_out` above 0, by user.
    """

    trainer: TrainerOptions = TrainerOptions()
    model: HstuConfig = HstuConfig()
    train_fraction: Annotated[float, Meta(gt=0, le=1)] = DEFAULT_TRAIN_FRACTION
    validation_fraction: Fraction = 0.05  # of the training events; of the new ones in a warm start
    leave_last_out: NonNegativeInt = 0  # number of each user's latest events that are held out
    validation_last_out: PositiveInt = 2  # number of each user's latest training events, with such a split
    max_validation_events: PositiveInt = 4000  # ranked per epoch: 2,000 take about a second of one core
    patience: PositiveInt = 10  # epochs without a better NDCG@10 before training stops
    labels: LabelOptions = LabelOptions()
    refit: bool = True  # off: the best validated weights themselves are the artifact

    @property
    def split(self) -> Split:
        return Split(self.train_fraction, self.leave_last_out)

    @property
    def validation_split(self) -> Split:
        """Split of the training events into those to fit and the later ones to validate on."""
        if self.leave_last_out:
            return Split(leave_last_out=self.validation_last_out)
        return Split(1 - self.validation_fraction)


@dataclass(slots=True)
class TrainingSetup:
    """A prepared log. train: all training events; fit: those before the validation slice."""

    options: TrainingOptions
    pipeline: PipelineOptions
    catalogue: Catalogue
    train: UserSequences
    fit: UserSequences
    validation_mask: np.ndarray  # bool [total], of `train`: the validation slice
    validation_events: HeldOutEvents  # a random part of the slice
    counters: dict[str, np.ndarray]  # of `train`
    fit_counters: dict[str, np.ndarray]
    provenance: TrainingProvenance
    fingerprint: str
    warm_start: WarmStart | None  # the artifact to continue from
    group: ProcessGroup

    @property
    def vocabulary(self) -> Vocabulary:
        return self.catalogue.vocabulary

    @property
    def label_rules(self) -> LabelRules:
        return LabelRules.from_options(self.pipeline.schema, self.options.labels)

    @property
    def config(self) -> HstuConfig:
        """Configuration of the model. A new model has no content features when no item has metadata."""
        model = self.options.model
        content_rows = model.content_rows if self.warm_start or self.catalogue.version else 0
        return msgspec.structs.replace(model, items=len(self.vocabulary), content_rows=content_rows)

    def trainer(self, sequences: UserSequences, epochs: int) -> Trainer[MultiTaskModel]:
        """Return a trainer whose learning rate falls over `epochs`. TrainingError: the sequences have no targets."""
        config = self.config
        options = self.options.trainer
        crop_length = min(options.crop_length, config.recent_length)
        options = msgspec.structs.replace(options, epochs=epochs, crop_length=crop_length)
        content = self.metadata(sequences).content() if config.content_rows else None

        def build() -> MultiTaskModel:
            model = MultiTaskModel(config, content, options.item_dropout)
            return self.warm_start.init_model(model) if self.warm_start else model

        device = resolve_device(self.pipeline.device)
        return Trainer(build, config.items, options, self.columns(sequences), device, self.group)

    def columns(self, sequences: UserSequences) -> TrainingColumns:
        """Return the training columns. TrainingError: they have no targets."""
        columns = TrainingColumns.from_sequences(
            sequences, self.label_rules, self.pipeline.exclusion, self.pipeline.ring_events, self.catalogue
        )
        columns.older_events = self.config.history_length - self.config.recent_length
        if not columns.target_mask.any():
            raise TrainingError(
                f"training: in {len(sequences)} training events of {len(sequences.offsets) - 1} users no user goes"
                " from one item to another that slates may hold then; give a longer log, split later (--train-fraction)"
                " or by user (--leave-last-out), or exclude fewer items (pipeline.exclude_actions)"
            )
        return columns

    def metadata(self, sequences: UserSequences) -> ItemMetadata:
        """Return the metadata of the vocabulary's items, with their event counts after training on these sequences."""
        tokens = np.arange(1, len(self.vocabulary))
        if self.warm_start is None:
            events = np.bincount(sequences.tokens, minlength=len(self.vocabulary))[1:]
            return ItemMetadata.from_catalogue(self.catalogue, tokens, events)
        events = self.warm_start.item_events(sequences, len(self.vocabulary))[1:]
        return ItemMetadata(self.catalogue.state(tokens), events, self.warm_start.artifact.metadata.scale)

    def artifact(self, weights: dict[str, Tensor], sequences: UserSequences) -> Artifact:
        """Return an unsaved artifact. sequences: `train` or `fit`, what the weights were trained on"""
        return artifacts.draft(
            self.config,
            self.pipeline.schema,
            weights,
            self.vocabulary.item_ids[1:],
            self.counters if sequences is self.train else self.fit_counters,
            self.metadata(sequences),
            self.provenance,
            self.options.labels,
        )

    def ranker(self, weights: dict[str, Tensor]) -> HstuStrategy:
        """Return the model with these weights as it will serve."""
        options = self.pipeline
        artifact = self.artifact(weights, self.fit)
        return load_hstu_strategy(artifact, self.catalogue, options.exclusion, options.device, options.threads)


def prepare(
    log: EventLog,
    options: TrainingOptions,
    pipeline: PipelineOptions,
    items: Iterable[Item] = (),
    warm_start: WarmStart | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TrainingSetup:
    """Split, count and label the log. warm_start: the artifact to continue from. Raises TrainingError."""
    if warm_start:
        warm_start.check(options.model, pipeline.schema, options.labels)
    train_log = _training_events(log, options.split)
    is_validation = _validation_mask(train_log, options, warm_start)
    old_ids = warm_start.artifact.item_ids if warm_start else []
    vocabulary = Vocabulary(dict.fromkeys([*old_ids, *train_log.item_ids]), pipeline.max_items)
    if vocabulary.rejected_count:
        raise TrainingError(f"training: {vocabulary.overflow_message}")
    train = UserSequences.from_log(train_log, vocabulary)
    fit = UserSequences.from_log(train_log.select(~is_validation), vocabulary)
    validation_mask = is_validation[train.log_positions]
    catalogue = _catalogue(vocabulary, items, warm_start)
    return TrainingSetup(
        options=options,
        pipeline=pipeline,
        catalogue=catalogue,
        train=train,
        fit=fit,
        validation_mask=validation_mask,
        validation_events=_validation_events(train, validation_mask, options, pipeline.ring_events),
        counters=_counter_state(train, vocabulary, options, pipeline, warm_start),
        fit_counters=_counter_state(fit, vocabulary, options, pipeline, warm_start),
        provenance=TrainingProvenance.from_log(options.split, train_log),
        fingerprint=_fingerprint(train, catalogue, options, pipeline, warm_start),
        warm_start=warm_start,
        group=group,
    )


def _training_events(log: EventLog, split: Split) -> EventLog:
    train_log = log.select(~split.test_mask(log))
    if not len(train_log):
        raise TrainingError(
            f"training: none of the {len(log)} events is left to train on: {split} is held out, and a split by time"
            " keeps events of one millisecond together; give a longer log, split later (--train-fraction) or by user"
            " (--leave-last-out)"
        )
    return train_log


def _validation_mask(train_log: EventLog, options: TrainingOptions, warm_start: WarmStart | None) -> np.ndarray:
    """Return bool [n]: the validation slice, of new events alone in a warm start."""
    if warm_start is None:
        return options.validation_split.test_mask(train_log)
    is_new = warm_start.new_events(train_log)
    validation = np.zeros(len(train_log), bool)
    validation[is_new] = options.validation_split.test_mask(train_log.select(is_new))
    return validation


def _validation_events(
    train: UserSequences, validation_mask: np.ndarray, options: TrainingOptions, ring_events: int
) -> HeldOutEvents:
    positions = np.random.default_rng(options.trainer.seed).permutation(np.flatnonzero(validation_mask))
    return HeldOutEvents(train, np.sort(positions[: options.max_validation_events]), ring_events)


def _catalogue(vocabulary: Vocabulary, items: Iterable[Item], warm_start: WarmStart | None) -> Catalogue:
    catalogue = Catalogue(vocabulary)
    records = [item for item in items if vocabulary.token(item.item_id)]
    if warm_start:
        warm_start.check_records(records)
        warm_start.load_into(catalogue)
    if records:
        catalogue.upsert(records)
    return catalogue


def _counter_state(
    sequences: UserSequences,
    vocabulary: Vocabulary,
    options: TrainingOptions,
    pipeline: PipelineOptions,
    warm_start: WarmStart | None,
) -> dict[str, np.ndarray]:
    """Return the counters' state, and the value of each of their items."""
    counters: Counters = new_counters(pipeline, vocabulary)
    rules = LabelRules.from_options(pipeline.schema, options.labels)
    values = item_values(sequences.histories, sequences.tokens, rules, len(vocabulary))
    if warm_start:
        warm_start.update_counters(counters, sequences)
        values = np.where(values > 0, values, warm_start.item_values(vocabulary))
    else:
        counters.observe(sequences.histories, np.ones(len(sequences), bool))
    state = counters.state()
    return state | {"values": values[vocabulary.tokens(state["items"])]}


def _fingerprint(
    train: UserSequences,
    catalogue: Catalogue,
    options: TrainingOptions,
    pipeline: PipelineOptions,
    warm_start: WarmStart | None,
) -> str:
    """Return 16 hex digits that identify the training events, item metadata and options."""
    version = warm_start.artifact.version if warm_start else ""
    digest = hashlib.sha256(msgspec.json.encode((options, pipeline, version), order="sorted"))
    digest.update(train.events.data)
    for array in (train.offsets, *catalogue.state(np.arange(len(catalogue.vocabulary))).values()):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
