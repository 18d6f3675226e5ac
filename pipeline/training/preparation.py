"""A log made ready to train on: cut, numbered, labelled, and what every model of it needs."""

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
from pipeline.evaluation.business_metrics import item_values
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Item
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import PipelineOptions, new_counters
from pipeline.training.batches import TrainingColumns
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.trainer import MultiTaskModel, Trainer, TrainerOptions
from pipeline.training.warm_start import WarmStart
from pipeline.types import Fraction, NonNegativeInt, PositiveInt


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `millrace train` may be told. The cut is by events in time order, or, with `leave_out` above 0, by user."""

    trainer: TrainerOptions = TrainerOptions()
    model: HstuConfig = HstuConfig()
    train_fraction: Annotated[float, Meta(gt=0, le=1)] = DEFAULT_TRAIN_FRACTION
    validation_fraction: Fraction = 0.05  # of the events before the cut; of the new ones when going on from an artifact
    leave_last_out: NonNegativeInt = 0  # of each user's events, the newest
    validation_last_out: PositiveInt = 2  # of each user's events before such a cut
    max_validation_events: PositiveInt = 4000  # at most, of the validation slice: 2,000 cost about a second of one core
    patience: PositiveInt = 10  # epochs without a better NDCG@10 before training stops
    refit: bool = True  # off: the judged weights themselves are the artifact

    @property
    def split(self) -> Split:
        return Split(self.train_fraction, self.leave_last_out)

    @property
    def validation_split(self) -> Split:
        """Of the events before the cut."""
        return (
            Split(leave_last_out=self.validation_last_out)
            if self.leave_last_out
            else Split(1 - self.validation_fraction)
        )


@dataclass(slots=True)
class TrainingSetup:
    """A log made ready. `known`: all events before the cut; `fit`: those before the validation slice, `judged`."""

    options: TrainingOptions
    pipeline: PipelineOptions
    catalogue: Catalogue
    train: UserSequences
    fit: UserSequences
    validation_mask: np.ndarray  # bool [total] of `known`
    validation_events: HeldOutEvents  # of the validation slice
    counters: dict[str, np.ndarray]
    provenance: TrainingProvenance
    fingerprint: str
    warm_start: WarmStart | None  # what training goes on from
    group: ProcessGroup

    @property
    def vocabulary(self) -> Vocabulary:
        return self.catalogue.vocabulary

    @property
    def config(self) -> HstuConfig:
        """Of the model; a new one reads no contents where there is no record at all."""
        model = self.options.model
        content_rows = model.content_rows if self.warm_start or self.catalogue.version else 0
        return msgspec.structs.replace(model, items=len(self.vocabulary), content_rows=content_rows)

    def trainer(self, corpus: UserSequences, epochs: int) -> Trainer[MultiTaskModel]:
        """One whose learning rate falls over so many epochs. TrainingError: the corpus has nothing to learn from."""
        config, options = self.config, self.options.trainer
        crop_events = min(options.crop_length, config.recent_length)
        options = msgspec.structs.replace(options, epochs=epochs, crop_length=crop_events)
        contents = self.metadata(corpus).content() if config.content_rows else None

        def build() -> MultiTaskModel:
            model = MultiTaskModel(config, contents, options.item_dropout)
            return self.warm_start.init_model(model) if self.warm_start else model

        examples, device = self.columns(corpus), resolve_device(self.pipeline.device)
        return Trainer(build, config.items, options, examples, device, self.group)

    def columns(self, corpus: UserSequences) -> TrainingColumns:
        """TrainingError when there are none."""
        examples = TrainingColumns.from_sequences(
            corpus, self.pipeline.schema, self.options.trainer.train_on_repeats, self.catalogue
        )
        examples.older_events = self.config.history_length - self.config.recent_length
        if not examples.target_mask.any():
            raise TrainingError(
                f"training: in the {len(corpus)} events of {len(corpus.offsets) - 1} users that are left to train on,"
                " no user goes from one item to another; give a longer log, cut later (--train-fraction) or cut by user"
                " (--leave-last-out)"
            )
        return examples

    def metadata(self, corpus: UserSequences) -> ItemMetadata:
        """What is known of the vocabulary's items when this corpus has taught."""
        tokens = np.arange(1, len(self.vocabulary))
        if self.warm_start is None:
            return ItemMetadata.from_catalogue(
                self.catalogue, tokens, np.bincount(corpus.tokens, minlength=len(tokens) + 1)[1:]
            )
        events = self.warm_start.item_events(corpus, len(self.vocabulary))[1:]
        return ItemMetadata(self.catalogue.state(tokens), events, self.warm_start.artifact.metadata.scale)

    def artifact(self, weights: dict[str, Tensor], corpus: UserSequences) -> Artifact:
        """corpus: what the weights were trained on."""
        item_ids, items = self.vocabulary.item_ids[1:], self.metadata(corpus)
        return artifacts.draft(
            self.config, self.pipeline.schema, weights, item_ids, self.counters, items, self.provenance
        )

    def ranker(self, weights: dict[str, Tensor]) -> HstuStrategy:
        """The model with these weights, as it will serve."""
        artifact, options = self.artifact(weights, self.fit), self.pipeline
        return HstuStrategy(artifact, self.catalogue, options.exclusion, options.device, options.threads)


def prepare(log: EventLog, options: TrainingOptions, pipeline: PipelineOptions, items: Iterable[Item] = (),
            warm_start: WarmStart | None = None, group: ProcessGroup = SINGLE_PROCESS) -> TrainingSetup:  # fmt: skip
    """Cut, number and label the log. base: what training goes on from. Raises TrainingError."""
    if warm_start:
        warm_start.check(options.model, pipeline.schema)
    known_log = _before_cut(log, options.split)
    validation = _validation(known_log, options, warm_start)
    old_ids = warm_start.artifact.item_ids if warm_start else []
    vocabulary = Vocabulary(dict.fromkeys([*old_ids, *known_log.item_ids]), pipeline.max_items)
    if vocabulary.rejected_count:
        raise TrainingError(f"training: {vocabulary.overflow_message}")
    known, fit = (UserSequences.from_log(part, vocabulary) for part in (known_log, known_log.select(~validation)))
    catalogue = _catalogue(vocabulary, items, warm_start)
    return TrainingSetup(
        options=options,
        pipeline=pipeline,
        catalogue=catalogue,
        train=known,
        fit=fit,
        validation_mask=validation[known.log_positions],
        validation_events=_judged(known, validation[known.log_positions], options),
        counters=_counted(known, vocabulary, pipeline, warm_start),
        provenance=TrainingProvenance.from_log(options.split, known_log),
        fingerprint=_fingerprint(known, catalogue, options, pipeline, warm_start),
        warm_start=warm_start,
        group=group,
    )


def _before_cut(log: EventLog, cut: Split) -> EventLog:
    known_log = log.select(~cut.test_mask(log))
    if not len(known_log):
        raise TrainingError(
            f"training: none of the {len(log)} events is left to train on: {cut} is left out, and a cut by time never"
            " parts events of one time; give a longer log, split later (--train-fraction) or by user (--leave-last-out)"
        )
    return known_log


def _validation(known_log: EventLog, options: TrainingOptions, base: WarmStart | None) -> np.ndarray:
    """bool [n]: the validation slice, of new events alone where the others taught the base."""
    if base is None:
        return options.validation_split.test_mask(known_log)
    new = base.new_events(known_log)
    validation = np.zeros(len(known_log), bool)
    validation[new] = options.validation_split.test_mask(known_log.select(new))
    return validation


def _catalogue(vocabulary: Vocabulary, items: Iterable[Item], base: WarmStart | None) -> Catalogue:
    catalogue = Catalogue(vocabulary)
    records = [item for item in items if vocabulary.token(item.item_id)]
    if base:
        base.check_records(records)
        base.load_into(catalogue)
    if records:
        catalogue.upsert(records)
    return catalogue


def _counted(
    known: UserSequences, vocabulary: Vocabulary, pipeline: PipelineOptions, base: WarmStart | None
) -> dict[str, np.ndarray]:
    """The counters' state, and the value of each of their items."""
    counters: Counters = new_counters(pipeline, vocabulary)
    values = item_values(known.histories, known.tokens, pipeline.schema, len(vocabulary))
    if base:
        base.update_counters(counters, known)
        values = np.where(values > 0, values, base.item_values(vocabulary))
    else:
        counters.observe(known.histories, known.histories.lengths)
    state = counters.state()
    return state | {"values": values[vocabulary.tokens(state["items"])]}


def _judged(known: UserSequences, validation: np.ndarray, options: TrainingOptions) -> HeldOutEvents:
    """A random part of the validation slice, bool [total] of `known`."""
    positions = np.random.default_rng(options.trainer.seed).permutation(np.flatnonzero(validation))
    return HeldOutEvents(known, np.sort(positions[: options.max_validation_events]), options.model.history_length)


def _fingerprint(
    known: UserSequences,
    catalogue: Catalogue,
    options: TrainingOptions,
    pipeline: PipelineOptions,
    base: WarmStart | None,
) -> str:
    version = base.artifact.version if base else ""
    digest = hashlib.sha256(msgspec.json.encode((options, pipeline, version), order="sorted"))
    digest.update(known.events.data)
    for array in (known.offsets, *catalogue.state(np.arange(len(catalogue.vocabulary))).values()):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
