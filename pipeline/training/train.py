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
from pipeline.data.event_log import EventLog
from pipeline.errors import TrainingError
from pipeline.evaluation.head_predictions import fit_calibration, held_out_labels
from pipeline.evaluation.metrics import RankingMetrics
from pipeline.evaluation.ranking import evaluate_ranking
from pipeline.features.labels import TASKS
from pipeline.model.calibration import IDENTITY
from pipeline.records import Item
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training import checkpoint
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare
from pipeline.training.trainer import Trainer
from pipeline.training.warm_start import CALIBRATION, WarmStart

K = 10


class EpochReport(msgspec.Struct, frozen=True):
    """`loss`: mean negative log likelihood of the next item, in nats; `judged`: on the validation slice."""

    epoch: int
    loss: float
    validation: RankingMetrics


class TrainingCallback(Protocol):
    """Told how training goes: before each stage, after each batch, and after each judged epoch, those before a resumed
    one first."""

    def phase(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


class TrainingState(msgspec.Struct):
    """The checkpoint's: what it belongs to, and how training went so far."""

    fingerprint: str
    reports: list[EpochReport]
    calibration: list[tuple[float, float]] = []  # of the best epoch's heads
    refitting: bool = False  # all reports are in, the checkpoint is of the training anew


Saved = tuple[dict[str, Tensor], TrainingState]


def train(log: EventLog, out: Path, options: TrainingOptions, pipeline: PipelineOptions, callback: TrainingCallback,
          created: str, resume: bool = False, items: Iterable[Item] = (), warm_start: WarmStart | None = None,
          group: ProcessGroup = SINGLE_PROCESS) -> Manifest:  # fmt: skip
    """Train on the log's first `until_share` and write the artifact to `out`. `created`: ISO 8601, UTC.

    items: what is known of items; those that the log before the cut does not have are left out.
    base: what training goes on from, see warm_start.py. In other processes than the first the manifest is unsigned.

    Raises TrainingError when the log cannot train a model, or `resume` finds no checkpoint of this log and options.
    """
    if pipeline.threads:
        torch.set_num_threads(pipeline.threads)
    task = prepare(log, options, pipeline, items, warm_start, group)
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    saved = _restored(path, task) if resume else None
    notes, weights = _optimise(task, path, callback, saved)
    if not notes.calibration:
        notes.calibration = _calibration(task, weights)
    if options.refit:
        weights = _refit(task, path, callback, notes, saved)
    weights[CALIBRATION] = torch.tensor(notes.calibration)
    model = task.artifact(weights, task.train if options.refit else task.fit)
    if not group.is_main:
        return model.manifest
    best = _best(notes.reports)
    metrics = {
        "epoch": float(best.epoch), "epochs": float(len(notes.reports)), "loss": best.loss,
        "validation_hit_rate": best.validation.hit_rate, "validation_ndcg": best.validation.ndcg,
        "training_events": float(len(task.train)),
    }  # fmt: skip
    manifest = artifacts.save(out, model, metrics, created)
    path.unlink()
    return manifest


def _optimise(
    task: TrainingSetup, path: Path, observer: TrainingCallback, saved: Saved | None
) -> tuple[TrainingState, dict[str, Tensor]]:
    """All reports, and the weights of the best epoch (none when the training anew had begun already)."""
    if saved and saved[1].refitting:
        _begin(task, saved[1].reports, observer)
        return saved[1], {}
    trainer = task.trainer(task.fit, task.options.trainer.epochs)
    notes, best_weights = TrainingState(task.fingerprint, []), trainer.weights()
    if saved:
        tensors, notes = saved
        trainer.restore(tensors)
        best_weights = {name.removeprefix("best."): w for name, w in tensors.items() if name.startswith("best.")}
    _begin(task, notes.reports, observer)
    while not _should_stop(notes.reports, task.options):
        loss = _epoch(trainer, observer)
        weights = trainer.weights()
        notes.reports.append(EpochReport(trainer.epochs_done, loss, _validate(task, weights)))
        best = _best(notes.reports)
        best_weights = weights if best.epoch == trainer.epochs_done else best_weights
        if task.group.is_main:
            tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
            checkpoint.save(path, tensors, notes)
        observer.epoch(notes.reports[-1], best)
    return notes, best_weights


def _validate(task: TrainingSetup, weights: dict[str, Tensor]) -> RankingMetrics:
    first = task.group.is_main
    got = evaluate_ranking(task.ranker(weights), task.validation_events, K) if first else RankingMetrics(0, 0, 0, 0)
    return RankingMetrics(len(task.validation_events), *task.group.broadcast([got.hit_rate, got.ndcg, got.mrr]))


def _begin(task: TrainingSetup, reports: list[EpochReport], observer: TrainingCallback) -> None:
    observer.phase("epoch", task.options.trainer.epochs)
    for number, report in enumerate(reports, 1):
        observer.epoch(report, _best(reports[:number]))


def _calibration(task: TrainingSetup, weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Of the judged model: the one that is trained anew has learnt from all labels, so it takes over these.

    Only the first process needs them.
    """
    if not task.group.is_main:
        return [IDENTITY] * len(TASKS)
    labels = held_out_labels(task.train, task.fit, task.validation_mask, task.pipeline.schema)
    return fit_calibration(task.ranker(weights), task.train, labels, task.options.trainer.seed)


def _refit(
    task: TrainingSetup, path: Path, observer: TrainingCallback, notes: TrainingState, saved: Saved | None
) -> dict[str, Tensor]:
    """Train anew on all that is known, for as many epochs as were best; the weights."""
    epochs = _best(notes.reports).epoch
    trainer = task.trainer(task.train, epochs)
    if saved and notes.refitting:
        trainer.restore(saved[0])
    notes.refitting = True
    observer.phase("anew on all events before the cut: epoch", epochs)
    while trainer.epochs_done < epochs:
        _epoch(trainer, observer)
        if task.group.is_main:
            checkpoint.save(path, trainer.state(), notes)
    return trainer.weights()


def _epoch(trainer: Trainer, observer: TrainingCallback) -> float:
    """One more; its mean loss. TrainingError when a loss or a weight is no number any more: nothing is written then."""
    number = trainer.epochs_done + 1
    why = "training has left the numbers; try a lower --learning-rate"

    def on_batch(loss: float, done: int, total: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"epoch {number}, batch {done} of {total}: the loss is {loss}: {why}")
        observer.batch(number, loss, done, total)

    loss = trainer.train_epoch(on_batch)
    for name, weight in trainer.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise TrainingError(f"epoch {number}: {name} holds infinity or NaN: {why}")
    return loss


def _best(reports: list[EpochReport]) -> EpochReport:
    """The highest NDCG, less noisy than a hit rate of as many events; the later of equals, which has learnt more."""
    return max(reports, key=lambda report: (report.validation.ndcg, report.epoch))


def _should_stop(reports: list[EpochReport], options: TrainingOptions) -> bool:
    if len(reports) >= options.trainer.epochs:
        return True
    return bool(reports) and len(reports) - _best(reports).epoch >= options.patience


def _restored(path: Path, task: TrainingSetup) -> Saved:
    tensors, notes = checkpoint.load(path, TrainingState)
    if notes.fingerprint != task.fingerprint:
        raise TrainingError(f"checkpoint {path}: it is of another log or of other options; train without --resume")
    return tensors, notes
