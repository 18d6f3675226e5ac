"""From a log to an artifact: cut by time, learn, stop early, keep the best, sign it.

Events from the cut on are never looked at. Of those before it the latest judge each epoch. The model is then trained
anew on all events before the cut, for as many epochs as were best, over which its learning rate falls: the latest
events are worth most (1.2 points of hit rate@10 on a simulated log). After every epoch a checkpoint is written beside
the artifact; `resume` goes on from it bit for bit.
"""

import hashlib
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
from pipeline.corpus import Corpus, place_of_share
from pipeline.errors import TrainingError
from pipeline.evaluation import measure
from pipeline.heads import labels_of
from pipeline.hstu import HstuConfig
from pipeline.hstu_rung import HstuRung
from pipeline.logcolumns import Log
from pipeline.measures import RankingMeasures
from pipeline.sampling import Examples
from pipeline.trainer import Positive, Share, Trainer, TrainerOptions
from pipeline.unified import PipelineOptions, new_counters
from pipeline.vocabulary import Vocabulary

JUDGED_EVENTS = 2000  # at most, of the validation slice: one epoch's judgement costs about a second of one core
K = 10


class TrainingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `millrace train` may be told. `until_share`: the cut, by events in time order."""

    trainer: TrainerOptions = TrainerOptions()
    model: HstuConfig = HstuConfig()
    until_share: Annotated[float, Meta(gt=0, le=1)] = 0.8
    validation_share: Share = 0.05  # of the events before the cut
    patience: Positive = 10  # epochs without a better hit rate before training stops
    refit: bool = True  # off: the judged weights themselves are the artifact


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
    refitting: bool = False  # all reports are in, the checkpoint is of the training anew


Saved = tuple[dict[str, Tensor], Notes]


@dataclass(slots=True)
class Task:
    """A log made ready. `known`: all events before the cut; `fit`: those before the validation slice."""

    options: TrainingOptions
    pipeline: PipelineOptions
    vocabulary: Vocabulary
    known: Corpus
    fit: Corpus
    judged: np.ndarray  # int64 positions in `known`
    counters: dict[str, np.ndarray]
    fingerprint: str

    @property
    def config(self) -> HstuConfig:
        return msgspec.structs.replace(self.options.model, items=len(self.vocabulary))

    def trainer(self, corpus: Corpus, epochs: int) -> Trainer:
        """One whose learning rate falls over so many epochs. TrainingError: the corpus has nothing to learn from."""
        end_ms = int(corpus.histories.ts_ms.max(initial=0))
        labels = labels_of(corpus.histories, self.pipeline.schema, end_ms)
        options = msgspec.structs.replace(self.options.trainer, epochs=epochs)
        examples = Examples.of(corpus, labels, options.repeats)
        if not examples.asked.any():
            raise TrainingError(
                f"training: in the {len(corpus)} events of {len(corpus.offsets) - 1} users that are left to train on,"
                " no user goes from one item to another; give a longer log or a larger --until-share"
            )
        return Trainer(self.config, options, examples, device_of(self.pipeline.device))

    def artifact(self, weights: dict[str, Tensor]) -> Artifact:
        item_ids = self.vocabulary.item_ids[1:]
        return artifacts.draft(self.config, self.pipeline.schema, weights, item_ids, self.counters)


def train(log: Log, out: Path, options: TrainingOptions, pipeline: PipelineOptions, observer: Observer,
          created: str, resume: bool = False) -> Manifest:  # fmt: skip
    """Train on the log's first `until_share` and write the artifact to `out`. `created`: ISO 8601, UTC.

    Raises TrainingError when the log cannot train a model, or `resume` finds no checkpoint of this log and options.
    """
    if pipeline.threads:
        torch.set_num_threads(pipeline.threads)
    task = prepare(log, options, pipeline)
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    saved = _restored(path, task) if resume else None
    notes, weights = _optimise(task, path, observer, saved)
    if options.refit:
        weights = _refit(task, path, observer, notes, saved)
    best = _best(notes.reports)
    metrics = {
        "epoch": float(best.epoch), "epochs": float(len(notes.reports)), "loss": best.loss,
        "validation_hit_rate": best.judged.hit_rate, "validation_ndcg": best.judged.ndcg,
        "training_events": float(len(task.known)),
    }  # fmt: skip
    manifest = artifacts.save(out, task.artifact(weights), metrics, created)
    path.unlink()
    return manifest


def prepare(log: Log, options: TrainingOptions, pipeline: PipelineOptions) -> Task:
    """Cut, number and label the log. Raises TrainingError."""
    known_log = _first(log, options.until_share)
    fit_log = _first(known_log, 1 - options.validation_share)
    vocabulary = Vocabulary(known_log.item_ids, pipeline.max_items)
    known, fit = _corpus(known_log, vocabulary), _corpus(fit_log, vocabulary)
    judged = np.flatnonzero(known.places >= len(fit))
    judged = np.random.default_rng(options.trainer.seed).permutation(judged)[:JUDGED_EVENTS]
    counters = new_counters(pipeline, vocabulary)
    counters.observe(known.histories, known.histories.lengths)
    fingerprint = _fingerprint(known, options, pipeline)
    return Task(options, pipeline, vocabulary, known, fit, np.sort(judged), counters.state(), fingerprint)


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
        notes.reports.append(EpochReport(trainer.epochs_done, loss, _judge(task, weights)))
        best = _best(notes.reports)
        best_weights = weights if best.epoch == trainer.epochs_done else best_weights
        tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
        checkpoint.save(path, tensors, notes)
        observer.epoch(notes.reports[-1], best)
    return notes, best_weights


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


def _judge(task: Task, weights: dict[str, Tensor]) -> RankingMeasures:
    options = task.pipeline
    rung = HstuRung(task.artifact(weights), task.vocabulary, options.exclusion, options.device, options.threads)
    return measure(rung, task.known, task.judged, K, task.config.max_events)


def _best(reports: list[EpochReport]) -> EpochReport:
    """The highest hit rate; the later of equals, which has learnt more."""
    return max(reports, key=lambda report: (report.judged.hit_rate, report.epoch))


def _finished(reports: list[EpochReport], options: TrainingOptions) -> bool:
    if len(reports) >= options.trainer.epochs:
        return True
    return bool(reports) and len(reports) - _best(reports).epoch >= options.patience


def _restored(path: Path, task: Task) -> Saved:
    tensors, notes = checkpoint.load(path, Notes)
    if notes.task != task.fingerprint:
        raise TrainingError(f"checkpoint {path}: it is of another log or of other options; train without --resume")
    return tensors, notes


def _first(log: Log, share: float) -> Log:
    """The log before the cut, with the ids of its own items alone."""
    end = place_of_share(log.ts_ms, share)
    present, items = np.unique(log.items[:end], return_inverse=True)
    item_ids = [log.item_ids[item] for item in present]
    return Log(log.user_ids, log.users[:end], item_ids, items.astype(np.int32), log.events[:end])


def _corpus(log: Log, vocabulary: Vocabulary) -> Corpus:
    return Corpus.of(log.events, vocabulary.tokens(log.events["item"]), log.users)


def _fingerprint(known: Corpus, options: TrainingOptions, pipeline: PipelineOptions) -> str:
    digest = hashlib.sha256(msgspec.json.encode((options, pipeline), order="sorted"))
    digest.update(known.events.tobytes())
    digest.update(known.offsets.tobytes())
    return digest.hexdigest()[:16]
