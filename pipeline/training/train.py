"""From a log to an artifact: cut by time or by user, learn, stop early, keep the best, sign it.

Events behind the cut are never looked at. Of those before it the latest judge each epoch: of all, or of each user. The
model is then trained anew on all events before the cut, for as many epochs as were best, over which its learning rate
falls: the latest events are worth most (1.2 points of hit rate@10 on a simulated log). After every epoch a checkpoint
is written beside the artifact; `resume` goes on from it bit for bit. Of several processes (distributed.py) the first
one judges and writes.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline.artifact import Manifest
from pipeline.data.event_log import Log
from pipeline.errors import TrainingError
from pipeline.evaluation.head_predictions import calibrated, unlearnt_labels
from pipeline.evaluation.metrics import RankingMeasures
from pipeline.evaluation.ranking import measure
from pipeline.features.labels import TASKS
from pipeline.model.calibration import IDENTITY
from pipeline.records import Item
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training import checkpoint
from pipeline.training.distributed import ALONE, Processes
from pipeline.training.preparation import Task, TrainingOptions, prepare
from pipeline.training.trainer import Trainer
from pipeline.training.warm_start import CALIBRATION, Base

K = 10


class EpochReport(msgspec.Struct, frozen=True):
    """`loss`: mean negative log likelihood of the next item, in nats; `judged`: on the validation slice."""

    epoch: int
    loss: float
    judged: RankingMeasures


class Observer(Protocol):
    """Told how training goes: before each stage, after each batch, and after each judged epoch, those before a resumed
    one first."""

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


def train(log: Log, out: Path, options: TrainingOptions, pipeline: PipelineOptions, observer: Observer,
          created: str, resume: bool = False, items: Iterable[Item] = (), base: Base | None = None,
          processes: Processes = ALONE) -> Manifest:  # fmt: skip
    """Train on the log's first `until_share` and write the artifact to `out`. `created`: ISO 8601, UTC.

    items: what is known of items; those that the log before the cut does not have are left out.
    base: what training goes on from, see warm_start.py. In other processes than the first the manifest is unsigned.

    Raises TrainingError when the log cannot train a model, or `resume` finds no checkpoint of this log and options.
    """
    if pipeline.threads:
        torch.set_num_threads(pipeline.threads)
    task = prepare(log, options, pipeline, items, base, processes)
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    saved = _restored(path, task) if resume else None
    notes, weights = _optimise(task, path, observer, saved)
    if not notes.calibration:
        notes.calibration = _calibration(task, weights)
    if options.refit:
        weights = _refit(task, path, observer, notes, saved)
    weights[CALIBRATION] = torch.tensor(notes.calibration)
    model = task.artifact(weights, task.known if options.refit else task.fit)
    if not processes.is_first:
        return model.manifest
    best = _best(notes.reports)
    metrics = {
        "epoch": float(best.epoch), "epochs": float(len(notes.reports)), "loss": best.loss,
        "validation_hit_rate": best.judged.hit_rate, "validation_ndcg": best.judged.ndcg,
        "training_events": float(len(task.known)),
    }  # fmt: skip
    manifest = artifacts.save(out, model, metrics, created)
    path.unlink()
    return manifest


def _optimise(task: Task, path: Path, observer: Observer, saved: Saved | None) -> tuple[Notes, dict[str, Tensor]]:
    """All reports, and the weights of the best epoch (none when the training anew had begun already)."""
    if saved and saved[1].refitting:
        _begin(task, saved[1].reports, observer)
        return saved[1], {}
    trainer = task.trainer(task.fit, task.options.trainer.epochs)
    notes, best_weights = Notes(task.fingerprint, []), trainer.weights()
    if saved:
        tensors, notes = saved
        trainer.restore(tensors)
        best_weights = {name.removeprefix("best."): w for name, w in tensors.items() if name.startswith("best.")}
    _begin(task, notes.reports, observer)
    while not _finished(notes.reports, task.options):
        loss = _epoch(trainer, observer)
        weights = trainer.weights()
        notes.reports.append(EpochReport(trainer.epochs_done, loss, _judge(task, weights)))
        best = _best(notes.reports)
        best_weights = weights if best.epoch == trainer.epochs_done else best_weights
        if task.processes.is_first:
            tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
            checkpoint.save(path, tensors, notes)
        observer.epoch(notes.reports[-1], best)
    return notes, best_weights


def _judge(task: Task, weights: dict[str, Tensor]) -> RankingMeasures:
    first = task.processes.is_first
    got = measure(task.ranker(weights), task.judged, K) if first else RankingMeasures(0, 0, 0, 0)
    return RankingMeasures(len(task.judged), *task.processes.told([got.hit_rate, got.ndcg, got.mrr]))


def _begin(task: Task, reports: list[EpochReport], observer: Observer) -> None:
    observer.stage("epoch", task.options.trainer.epochs)
    for number, report in enumerate(reports, 1):
        observer.epoch(report, _best(reports[:number]))


def _calibration(task: Task, weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Of the judged model: the one that is trained anew has learnt from all labels, so it takes over these.

    Only the first process needs them.
    """
    if not task.processes.is_first:
        return [IDENTITY] * len(TASKS)
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
        if task.processes.is_first:
            checkpoint.save(path, trainer.state(), notes)
    return trainer.weights()


def _epoch(trainer: Trainer, observer: Observer) -> float:
    """One more; its mean loss. TrainingError when a loss or a weight is no number any more: nothing is written then."""
    number = trainer.epochs_done + 1
    why = "training has left the numbers; try a lower --learning-rate"

    def on_batch(loss: float, done: int, total: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"epoch {number}, batch {done} of {total}: the loss is {loss}: {why}")
        observer.batch(number, loss, done, total)

    loss = trainer.epoch(on_batch)
    for name, weight in trainer.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise TrainingError(f"epoch {number}: {name} holds infinity or NaN: {why}")
    return loss


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
