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
from pipeline.backends.torch import device_of
from pipeline.counters.counters import Counters
from pipeline.data.event_log import Log
from pipeline.data.sequences import Corpus
from pipeline.data.split import DEFAULT_SHARE, Cut, Taught
from pipeline.errors import TrainingError
from pipeline.evaluation.business_metrics import item_values
from pipeline.evaluation.ranking import Scored
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import KnownItems
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Item
from pipeline.serving.hstu_strategy import HstuRung
from pipeline.serving.pipeline import PipelineOptions, new_counters
from pipeline.training.batches import Examples
from pipeline.training.distributed import ALONE, Processes
from pipeline.training.trainer import Model, Positive, Share, Trainer, TrainerOptions
from pipeline.training.warm_start import Base


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `millrace train` may be told. The cut is by events in time order, or, with `leave_out` above 0, by user."""

    trainer: TrainerOptions = TrainerOptions()
    model: HstuConfig = HstuConfig()
    until_share: Annotated[float, Meta(gt=0, le=1)] = DEFAULT_SHARE
    validation_share: Share = 0.05  # of the events before the cut; of the new ones when going on from an artifact
    leave_out: Annotated[int, Meta(ge=0)] = 0  # of each user's events, the newest
    validation_last: Positive = 2  # of each user's events before such a cut
    judged_events: Positive = 4000  # at most, of the validation slice: 2,000 cost about a second of one core
    patience: Positive = 10  # epochs without a better NDCG@10 before training stops
    refit: bool = True  # off: the judged weights themselves are the artifact

    @property
    def cut(self) -> Cut:
        return Cut(self.until_share, self.leave_out)

    @property
    def validation_cut(self) -> Cut:
        """Of the events before the cut."""
        return Cut(last=self.validation_last) if self.leave_out else Cut(1 - self.validation_share)


@dataclass(slots=True)
class Task:
    """A log made ready. `known`: all events before the cut; `fit`: those before the validation slice, `judged`."""

    options: TrainingOptions
    pipeline: PipelineOptions
    catalogue: Catalogue
    known: Corpus
    fit: Corpus
    validation: np.ndarray  # bool [total] of `known`
    judged: Scored  # of the validation slice
    counters: dict[str, np.ndarray]
    taught: Taught
    fingerprint: str
    base: Base | None  # what training goes on from
    processes: Processes

    @property
    def vocabulary(self) -> Vocabulary:
        return self.catalogue.vocabulary

    @property
    def config(self) -> HstuConfig:
        """Of the model; a new one reads no contents where there is no record at all."""
        model = self.options.model
        content_rows = model.content_rows if self.base or self.catalogue.version else 0
        return msgspec.structs.replace(model, items=len(self.vocabulary), content_rows=content_rows)

    def trainer(self, corpus: Corpus, epochs: int) -> Trainer[Model]:
        """One whose learning rate falls over so many epochs. TrainingError: the corpus has nothing to learn from."""
        config, options = self.config, self.options.trainer
        crop_events = min(options.crop_events, config.whole_events)
        options = msgspec.structs.replace(options, epochs=epochs, crop_events=crop_events)
        contents = self.items(corpus).contents() if config.content_rows else None

        def build() -> Model:
            model = Model(config, contents, options.cold_share)
            return self.base.begin(model) if self.base else model

        examples, device = self.examples(corpus), device_of(self.pipeline.device)
        return Trainer(build, config.items, options, examples, device, self.processes)

    def examples(self, corpus: Corpus) -> Examples:
        """TrainingError when there are none."""
        examples = Examples.of(corpus, self.pipeline.schema, self.options.trainer.repeats, self.catalogue)
        examples.older_events = self.config.read_events - self.config.whole_events
        if not examples.asked.any():
            raise TrainingError(
                f"training: in the {len(corpus)} events of {len(corpus.offsets) - 1} users that are left to train on,"
                " no user goes from one item to another; give a longer log, cut later (--until-share) or cut by user"
                " (--leave-out)"
            )
        return examples

    def items(self, corpus: Corpus) -> KnownItems:
        """What is known of the vocabulary's items when this corpus has taught."""
        tokens = np.arange(1, len(self.vocabulary))
        if self.base is None:
            return KnownItems.of(self.catalogue, tokens, np.bincount(corpus.tokens, minlength=len(tokens) + 1)[1:])
        events = self.base.events(corpus, len(self.vocabulary))[1:]
        return KnownItems(self.catalogue.state(tokens), events, self.base.artifact.items.scale)

    def artifact(self, weights: dict[str, Tensor], corpus: Corpus) -> Artifact:
        """corpus: what the weights were trained on."""
        item_ids, items = self.vocabulary.item_ids[1:], self.items(corpus)
        return artifacts.draft(self.config, self.pipeline.schema, weights, item_ids, self.counters, items, self.taught)

    def ranker(self, weights: dict[str, Tensor]) -> HstuRung:
        """The model with these weights, as it will serve."""
        artifact, options = self.artifact(weights, self.fit), self.pipeline
        return HstuRung(artifact, self.catalogue, options.exclusion, options.device, options.threads)


def prepare(log: Log, options: TrainingOptions, pipeline: PipelineOptions, items: Iterable[Item] = (),
            base: Base | None = None, processes: Processes = ALONE) -> Task:  # fmt: skip
    """Cut, number and label the log. base: what training goes on from. Raises TrainingError."""
    if base:
        base.check(options.model, pipeline.schema)
    known_log = _before_cut(log, options.cut)
    validation = _validation(known_log, options, base)
    old_ids = base.artifact.item_ids if base else []
    vocabulary = Vocabulary(dict.fromkeys([*old_ids, *known_log.item_ids]), pipeline.max_items)
    if vocabulary.refused:
        raise TrainingError(f"training: {vocabulary.overflow}")
    known, fit = (Corpus.of_log(part, vocabulary) for part in (known_log, known_log.part(~validation)))
    catalogue = _catalogue(vocabulary, items, base)
    return Task(
        options=options,
        pipeline=pipeline,
        catalogue=catalogue,
        known=known,
        fit=fit,
        validation=validation[known.places],
        judged=_judged(known, validation[known.places], options),
        counters=_counted(known, vocabulary, pipeline, base),
        taught=Taught.of(options.cut, known_log),
        fingerprint=_fingerprint(known, catalogue, options, pipeline, base),
        base=base,
        processes=processes,
    )


def _before_cut(log: Log, cut: Cut) -> Log:
    known_log = log.part(~cut.left_out(log))
    if not len(known_log):
        raise TrainingError(
            f"training: none of the {len(log)} events is left to train on: {cut} is left out, and a cut by time never"
            " parts events of one time; give a longer log, cut later (--until-share) or cut by user (--leave-out)"
        )
    return known_log


def _validation(known_log: Log, options: TrainingOptions, base: Base | None) -> np.ndarray:
    """bool [n]: the validation slice, of new events alone where the others taught the base."""
    if base is None:
        return options.validation_cut.left_out(known_log)
    new = base.new_events(known_log)
    validation = np.zeros(len(known_log), bool)
    validation[new] = options.validation_cut.left_out(known_log.part(new))
    return validation


def _catalogue(vocabulary: Vocabulary, items: Iterable[Item], base: Base | None) -> Catalogue:
    catalogue = Catalogue(vocabulary)
    records = [item for item in items if vocabulary.token(item.item_id)]
    if base:
        base.check_records(records)
        base.inform(catalogue)
    if records:
        catalogue.put(records)
    return catalogue


def _counted(
    known: Corpus, vocabulary: Vocabulary, pipeline: PipelineOptions, base: Base | None
) -> dict[str, np.ndarray]:
    """The counters' state, and the value of each of their items."""
    counters: Counters = new_counters(pipeline, vocabulary)
    values = item_values(known.histories, known.tokens, pipeline.schema, len(vocabulary))
    if base:
        base.count(counters, known)
        values = np.where(values > 0, values, base.values(vocabulary))
    else:
        counters.observe(known.histories, known.histories.lengths)
    state = counters.state()
    return state | {"values": values[vocabulary.tokens(state["items"])]}


def _judged(known: Corpus, validation: np.ndarray, options: TrainingOptions) -> Scored:
    """A random part of the validation slice, bool [total] of `known`."""
    positions = np.random.default_rng(options.trainer.seed).permutation(np.flatnonzero(validation))
    return Scored(known, np.sort(positions[: options.judged_events]), options.model.read_events)


def _fingerprint(
    known: Corpus, catalogue: Catalogue, options: TrainingOptions, pipeline: PipelineOptions, base: Base | None
) -> str:
    version = base.artifact.version if base else ""
    digest = hashlib.sha256(msgspec.json.encode((options, pipeline, version), order="sorted"))
    digest.update(known.events.data)
    for array in (known.offsets, *catalogue.state(np.arange(len(catalogue.vocabulary))).values()):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
