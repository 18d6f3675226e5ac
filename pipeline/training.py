"""From a log to an artifact: cut by time, learn, stop early, keep the best, sign it.

Events from the cut on are never looked at. Of those before it the latest judge each epoch, and the weights with the
best hit rate on them are kept. After every epoch a checkpoint is written beside the artifact; `resume` goes on from it
bit for bit.
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


class EpochReport(msgspec.Struct, frozen=True):
    """`loss`: mean negative log likelihood of the next item, in nats; `judged`: on the validation slice."""

    epoch: int
    loss: float
    judged: RankingMeasures


class Observer(Protocol):
    """Told how training goes: after each batch and after each epoch."""

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


class Notes(msgspec.Struct):
    """The checkpoint's: what it belongs to, and how training went so far."""

    task: str
    reports: list[EpochReport]


@dataclass(slots=True)
class Task:
    """A log made ready. `known`: all events before the cut; `examples`: those before the validation slice."""

    options: TrainingOptions
    pipeline: PipelineOptions
    vocabulary: Vocabulary
    known: Corpus
    examples: Examples
    judged: np.ndarray  # int64 positions in `known`
    counters: dict[str, np.ndarray]
    fingerprint: str

    @property
    def config(self) -> HstuConfig:
        return msgspec.structs.replace(self.options.model, items=len(self.vocabulary))

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
    best = _optimise(task, path, observer, resume)
    weights, notes = checkpoint.load(path, Notes)
    kept = {name.removeprefix("best."): weight for name, weight in weights.items() if name.startswith("best.")}
    metrics = {
        "epoch": float(best.epoch), "epochs": float(len(notes.reports)), "loss": best.loss,
        "validation_hit_rate": best.judged.hit_rate, "validation_ndcg": best.judged.ndcg,
        "training_events": float(len(task.known)),
    }  # fmt: skip
    manifest = artifacts.save(out, task.artifact(kept), metrics, created)
    path.unlink()
    return manifest


def prepare(log: Log, options: TrainingOptions, pipeline: PipelineOptions) -> Task:
    """Cut, number and label the log. Raises TrainingError."""
    known_log = _first(log, options.until_share)
    fit_log = _first(known_log, 1 - options.validation_share)
    vocabulary = Vocabulary(known_log.item_ids, pipeline.max_items)
    known, fit = _corpus(known_log, vocabulary), _corpus(fit_log, vocabulary)
    labels = labels_of(fit.histories, pipeline.schema, int(fit_log.ts_ms.max(initial=0)))
    examples = Examples.of(fit, labels, options.trainer.repeats)
    if not examples.asked.any():
        raise TrainingError(
            f"training: in the {len(fit)} events of {len(fit.offsets) - 1} users that are left to train on, no user"
            " goes from one item to another; give a longer log or a larger --until-share"
        )
    judged = np.flatnonzero(known.places >= len(fit))
    judged = np.random.default_rng(options.trainer.seed).permutation(judged)[:JUDGED_EVENTS]
    counters = new_counters(pipeline, vocabulary)
    counters.observe(known.histories, known.histories.lengths)
    fingerprint = _fingerprint(known, options, pipeline)
    return Task(options, pipeline, vocabulary, known, examples, np.sort(judged), counters.state(), fingerprint)


def _optimise(task: Task, path: Path, observer: Observer, resume: bool) -> EpochReport:
    trainer = Trainer(task.config, task.options.trainer, task.examples, device_of(task.pipeline.device))
    notes, best_weights = Notes(task.fingerprint, []), trainer.weights()
    if resume:
        notes, best_weights = _restore(trainer, path, task)
    while not _finished(notes.reports, task.options):
        epoch = trainer.epochs_done + 1
        loss = trainer.epoch(lambda loss, done, total, epoch=epoch: observer.batch(epoch, loss, done, total))
        weights = trainer.weights()
        notes.reports.append(EpochReport(epoch, loss, _judge(task, weights)))
        best = _best(notes.reports)
        best_weights = weights if best.epoch == epoch else best_weights
        tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
        checkpoint.save(path, tensors, notes)
        observer.epoch(notes.reports[-1], best)
    return _best(notes.reports)


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


def _restore(trainer: Trainer, path: Path, task: Task) -> tuple[Notes, dict[str, Tensor]]:
    tensors, notes = checkpoint.load(path, Notes)
    if notes.task != task.fingerprint:
        raise TrainingError(f"checkpoint {path}: it is of another log or of other options; train without --resume")
    trainer.restore(tensors)
    return notes, {name.removeprefix("best."): w for name, w in tensors.items() if name.startswith("best.")}


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
