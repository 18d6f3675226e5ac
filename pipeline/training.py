"""From a log to an artifact: cut by time or by user, learn, stop early, keep the best, sign it.

Events behind the cut are never looked at. Of those before it the latest judge each epoch: of all, or of each user. The
model is then trained anew on all events before the cut, for as many epochs as were best, over which its learning rate
falls: the latest events are worth most (1.2 points of hit rate@10 on a simulated log). After every epoch a checkpoint
is written beside the artifact; `resume` goes on from it bit for bit.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline import checkpoint
from pipeline.artifact import Artifact, Manifest
from pipeline.backends.torch import device_of
from pipeline.catalogue import Catalogue
from pipeline.corpus import Corpus
from pipeline.cut import DEFAULT_SHARE, Cut, Taught
from pipeline.errors import TrainingError
from pipeline.head_odds import calibrated, unlearnt_labels
from pipeline.hstu_config import HstuConfig
from pipeline.hstu_rung import HstuRung
from pipeline.known_items import KnownItems
from pipeline.logcolumns import Log
from pipeline.measures import RankingMeasures
from pipeline.ranking import Scored, measure
from pipeline.records import Item
from pipeline.sampling import Examples
from pipeline.trainer import Model, Positive, Share, Trainer, TrainerOptions
from pipeline.unified import PipelineOptions, new_counters
from pipeline.vocabulary import Vocabulary
from pipeline.worth import item_values

K = 10


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `millrace train` may be told. The cut is by events in time order, or, with `leave_out` above 0, by user."""

    trainer: TrainerOptions = TrainerOptions()
    model: HstuConfig = HstuConfig()
    until_share: Annotated[float, Meta(gt=0, le=1)] = DEFAULT_SHARE
    validation_share: Share = 0.05  # of the events before the cut
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


class EpochReport(msgspec.Struct, frozen=True):
    """`loss`: mean negative log likelihood of the next item, in nats; `judged`: on the validation slice."""

    epoch: int
    loss: float
    judged: RankingMeasures


class Observer(Protocol):
    """Told how training goes: before each stage, after each batch, and after each judged epoch."""

    def stage(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


class Notes(msgspec.Struct):
    """The checkpoint's: what it belongs to, and how training went so far."""

    task: str
    reports: list[EpochReport]
    calibration: list[tuple[float, float]] = []  # of the best epoch's heads
    refitting: bool = False  # all reports are in, the checkpoint is of the training anew


Saved = tuple[dict[str, Tensor], Notes]


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

    @property
    def vocabulary(self) -> Vocabulary:
        return self.catalogue.vocabulary

    @property
    def config(self) -> HstuConfig:
        """Of the model; without any record there is no content to read."""
        model = self.options.model
        content_rows = model.content_rows if self.catalogue.version else 0
        return msgspec.structs.replace(model, items=len(self.vocabulary), content_rows=content_rows)

    def trainer(self, corpus: Corpus, epochs: int) -> Trainer[Model]:
        """One whose learning rate falls over so many epochs. TrainingError: the corpus has nothing to learn from."""
        config, options = self.config, self.options.trainer
        crop_events = min(options.crop_events, config.whole_events)
        options = msgspec.structs.replace(options, epochs=epochs, crop_events=crop_events)
        contents = self.items(corpus).contents() if config.content_rows else None
        examples, device = self.examples(corpus), device_of(self.pipeline.device)
        return Trainer(lambda: Model(config, contents, options.cold_share), config.items, options, examples, device)

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
        return KnownItems.of(self.catalogue, tokens, np.bincount(corpus.tokens, minlength=len(tokens) + 1)[1:])

    def artifact(self, weights: dict[str, Tensor], corpus: Corpus) -> Artifact:
        """corpus: what the weights were trained on."""
        item_ids, items = self.vocabulary.item_ids[1:], self.items(corpus)
        return artifacts.draft(self.config, self.pipeline.schema, weights, item_ids, self.counters, items, self.taught)

    def ranker(self, weights: dict[str, Tensor]) -> HstuRung:
        """The model with these weights, as it will serve."""
        artifact, options = self.artifact(weights, self.fit), self.pipeline
        return HstuRung(artifact, self.catalogue, options.exclusion, options.device, options.threads)


def train(log: Log, out: Path, options: TrainingOptions, pipeline: PipelineOptions, observer: Observer,
          created: str, resume: bool = False, items: Iterable[Item] = ()) -> Manifest:  # fmt: skip
    """Train on the log's first `until_share` and write the artifact to `out`. `created`: ISO 8601, UTC.

    items: what is known of items; those that the log before the cut does not have are left out.

    Raises TrainingError when the log cannot train a model, or `resume` finds no checkpoint of this log and options.
    """
    if pipeline.threads:
        torch.set_num_threads(pipeline.threads)
    task = prepare(log, options, pipeline, items)
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    saved = _restored(path, task) if resume else None
    notes, weights = _optimise(task, path, observer, saved)
    if not notes.calibration:
        notes.calibration = _calibration(task, weights)
    if options.refit:
        weights = _refit(task, path, observer, notes, saved)
    weights["heads.calibration"] = torch.tensor(notes.calibration)
    best = _best(notes.reports)
    metrics = {
        "epoch": float(best.epoch), "epochs": float(len(notes.reports)), "loss": best.loss,
        "validation_hit_rate": best.judged.hit_rate, "validation_ndcg": best.judged.ndcg,
        "training_events": float(len(task.known)),
    }  # fmt: skip
    manifest = artifacts.save(out, task.artifact(weights, task.known if options.refit else task.fit), metrics, created)
    path.unlink()
    return manifest


def prepare(log: Log, options: TrainingOptions, pipeline: PipelineOptions, items: Iterable[Item] = ()) -> Task:
    """Cut, number and label the log. Raises TrainingError."""
    known_log = log.part(~options.cut.left_out(log))
    validation = options.validation_cut.left_out(known_log)
    vocabulary = Vocabulary(known_log.item_ids, pipeline.max_items)
    known, fit = (Corpus.of_log(part, vocabulary) for part in (known_log, known_log.part(~validation)))
    catalogue = Catalogue(vocabulary)
    if records := [item for item in items if vocabulary.token(item.item_id)]:
        catalogue.put(records)
    counters = new_counters(pipeline, vocabulary)
    counters.observe(known.histories, known.histories.lengths)
    tokens = vocabulary.tokens(counters.state()["items"])
    values = item_values(known.histories, known.tokens, pipeline.schema, len(vocabulary))[tokens]
    return Task(
        options=options,
        pipeline=pipeline,
        catalogue=catalogue,
        known=known,
        fit=fit,
        validation=validation[known.places],
        judged=_judged(known, validation[known.places], options),
        counters=counters.state() | {"values": values},
        taught=Taught.of(options.cut, known_log),
        fingerprint=_fingerprint(known, catalogue, options, pipeline),
    )


def _judged(known: Corpus, validation: np.ndarray, options: TrainingOptions) -> Scored:
    """A random part of the validation slice, bool [total] of `known`."""
    positions = np.random.default_rng(options.trainer.seed).permutation(np.flatnonzero(validation))
    return Scored(known, np.sort(positions[: options.judged_events]), options.model.read_events)


def _optimise(task: Task, path: Path, observer: Observer, saved: Saved | None) -> tuple[Notes, dict[str, Tensor]]:
    """All reports, and the weights of the best epoch (none when the training anew had begun already)."""
    if saved and saved[1].refitting:
        return saved[1], {}
    trainer = task.trainer(task.fit, task.options.trainer.epochs)
    notes, best_weights = Notes(task.fingerprint, []), trainer.weights()
    if saved:
        tensors, notes = saved
        trainer.restore(tensors)
        best_weights = {name.removeprefix("best."): w for name, w in tensors.items() if name.startswith("best.")}
    observer.stage("epoch", task.options.trainer.epochs)
    while not _finished(notes.reports, task.options):
        loss = _epoch(trainer, observer)
        weights = trainer.weights()
        notes.reports.append(EpochReport(trainer.epochs_done, loss, measure(task.ranker(weights), task.judged, K)))
        best = _best(notes.reports)
        best_weights = weights if best.epoch == trainer.epochs_done else best_weights
        tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
        checkpoint.save(path, tensors, notes)
        observer.epoch(notes.reports[-1], best)
    return notes, best_weights


def _calibration(task: Task, weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Of the judged model: the one that is trained anew has learnt from all labels, so it takes over these."""
    labels = unlearnt_labels(task.known, task.fit, task.validation, task.pipeline.schema)
    return calibrated(task.ranker(weights), task.known, labels, task.options.trainer.seed)


def _refit(task: Task, path: Path, observer: Observer, notes: Notes, saved: Saved | None) -> dict[str, Tensor]:
    """Train anew on all that is known, for as many epochs as were best; the weights."""
    epochs = _best(notes.reports).epoch
    trainer = task.trainer(task.known, epochs)
    if saved and notes.refitting:
        trainer.restore(saved[0])
    notes.refitting = True
    observer.stage("anew on all events before the cut: epoch", epochs)
    while trainer.epochs_done < epochs:
        _epoch(trainer, observer)
        checkpoint.save(path, trainer.state(), notes)
    return trainer.weights()


def _epoch(trainer: Trainer, observer: Observer) -> float:
    number = trainer.epochs_done + 1
    return trainer.epoch(lambda loss, done, total: observer.batch(number, loss, done, total))


def _best(reports: list[EpochReport]) -> EpochReport:
    """The highest NDCG, less noisy than a hit rate of as many events; the later of equals, which has learnt more."""
    return max(reports, key=lambda report: (report.judged.ndcg, report.epoch))


def _finished(reports: list[EpochReport], options: TrainingOptions) -> bool:
    if len(reports) >= options.trainer.epochs:
        return True
    return bool(reports) and len(reports) - _best(reports).epoch >= options.patience


def _restored(path: Path, task: Task) -> Saved:
    tensors, notes = checkpoint.load(path, Notes)
    if notes.task != task.fingerprint:
        raise TrainingError(f"checkpoint {path}: it is of another log or of other options; train without --resume")
    return tensors, notes


def _fingerprint(known: Corpus, catalogue: Catalogue, options: TrainingOptions, pipeline: PipelineOptions) -> str:
    digest = hashlib.sha256(msgspec.json.encode((options, pipeline), order="sorted"))
    digest.update(known.events.tobytes())
    for array in (known.offsets, *catalogue.state(np.arange(len(catalogue.vocabulary))).values()):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
