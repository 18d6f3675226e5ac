"""From a log to an artifact: split by time or by user, train, stop early, refit, save with hashes.

Held-out events are never read. The latest training events, of all or of each user, are the validation slice that scores
each epoch. The model is then refitted from scratch on all training events for the best number of epochs, over which its
learning rate falls: the latest events matter most (1.2 points of hit rate@10 on a simulated log). After every epoch a
checkpoint is written next to the artifact; `resume` continues from it bit for bit. Of several processes
(distributed.py) the main one validates and writes.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline.data.event_log import EventLog
from pipeline.errors import TrainingError
from pipeline.evaluation.head_predictions import fit_calibration, held_out_labels
from pipeline.evaluation.metrics import RankingMetrics
from pipeline.evaluation.ranking import StrategyRecommender, evaluate_ranking, excluded_sentence
from pipeline.features.labels import TASKS
from pipeline.manifest import Manifest
from pipeline.model.calibration import IDENTITY
from pipeline.records import Item
from pipeline.strategies.options import PipelineOptions
from pipeline.training import checkpoint
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare
from pipeline.training.trainer import Trainer
from pipeline.training.warm_start import CALIBRATION, WarmStart

K = 10


class EpochReport(msgspec.Struct, frozen=True):
    """Metrics of one epoch.

    loss: mean negative log likelihood of the next item, in nats; validation: metrics on the validation slice
    """

    epoch: int
    loss: float
    validation: RankingMetrics


class TrainingCallback(Protocol):
    """Progress of training."""

    def note(self, text: str) -> None:
        """Called before training with a sentence on what to know about its figures."""

    def phase(self, name: str, epochs: int) -> None:
        """Called before each phase: "epoch", then the refit."""

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        """Called after each batch, `done` of `total` in this epoch."""

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        """Called after each validated epoch; on resume first for those of the checkpoint."""


class TrainingState(msgspec.Struct):
    """The checkpoint's state. fingerprint: of the log and options that it belongs to."""

    fingerprint: str
    reports: list[EpochReport]
    calibration: list[tuple[float, float]] = []  # of the best epoch's heads
    refitting: bool = False  # all reports are in, the checkpoint's tensors belong to the refit


Checkpoint = tuple[dict[str, Tensor], TrainingState]


def train(
    log: EventLog,
    out: Path,
    options: TrainingOptions,
    pipeline: PipelineOptions,
    callback: TrainingCallback,
    created: str,
    resume: bool = False,
    items: Iterable[Item] = (),
    warm_start: WarmStart | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Manifest:
    """Train on the log's training events and write the artifact to `out`. created: ISO 8601, UTC.

    items: item metadata; items that are not in the training events are left out
    warm_start: the artifact to continue from, see warm_start.py
    Returns the manifest; in processes other than the main one that of an unsaved draft.

    Raises TrainingError when the log cannot train a model, or `resume` finds no checkpoint of this log and options.
    """
    if pipeline.threads:
        torch.set_num_threads(pipeline.threads)
    setup = prepare(log, options, pipeline, items, warm_start, group)
    if note := _excluded_note(setup):
        callback.note(note)
    path = out.with_name(f"{out.name}.checkpoint.safetensors")
    saved = _load_checkpoint(path, setup) if resume else None
    state, weights = _fit(setup, path, callback, saved)
    if not state.calibration:
        state.calibration = _calibrate(setup, weights)
    if options.refit:
        weights = _refit(setup, path, callback, state, saved)
    weights[CALIBRATION] = torch.tensor(state.calibration)
    artifact = setup.artifact(weights, setup.train if options.refit else setup.fit)
    if not group.is_main:
        return artifact.manifest
    manifest = artifacts.save(out, artifact, _manifest_metrics(state, setup), created)
    path.unlink()
    return manifest


def _excluded_note(setup: TrainingSetup) -> str:
    """Return a sentence on the validation events that no slate can hit; empty without any."""
    events = setup.validation_events
    excluded = events.count_excluded(setup.pipeline.exclusion)
    return f"validation: {excluded_sentence(excluded, len(events))}" if excluded else ""


def _manifest_metrics(state: TrainingState, setup: TrainingSetup) -> dict[str, float]:
    best = _best(state.reports)
    return {
        "epoch": float(best.epoch),
        "epochs": float(len(state.reports)),
        "loss": best.loss,
        "validation_hit_rate": best.validation.hit_rate,
        "validation_ndcg": best.validation.ndcg,
        "validation_ring_events": float(setup.pipeline.ring_events),
        "training_events": float(len(setup.train)),
    }


def _fit(
    setup: TrainingSetup, path: Path, callback: TrainingCallback, saved: Checkpoint | None
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Train with early stopping. Return all reports and the best epoch's weights, empty when resuming in the refit."""
    if saved and saved[1].refitting:
        _report_start(setup, saved[1].reports, callback)
        return saved[1], {}
    trainer = setup.trainer(setup.fit, setup.options.trainer.epochs)
    state = TrainingState(setup.fingerprint, [])
    best_weights = trainer.weights()
    if saved:
        tensors, state = saved
        trainer.restore(tensors)
        best_weights = {name.removeprefix("best."): w for name, w in tensors.items() if name.startswith("best.")}
    _report_start(setup, state.reports, callback)
    while not _should_stop(state.reports, setup.options):
        loss = _train_epoch(trainer, callback)
        weights = trainer.weights()
        state.reports.append(EpochReport(trainer.epochs_done, loss, _validate(setup, weights)))
        best = _best(state.reports)
        best_weights = weights if best.epoch == trainer.epochs_done else best_weights
        if setup.group.is_main:
            tensors = trainer.state() | {f"best.{name}": weight for name, weight in best_weights.items()}
            checkpoint.save(path, tensors, state)
        callback.epoch(state.reports[-1], best)
    return state, best_weights


def _report_start(setup: TrainingSetup, reports: list[EpochReport], callback: TrainingCallback) -> None:
    callback.phase("epoch", setup.options.trainer.epochs)
    for count, report in enumerate(reports, 1):
        callback.epoch(report, _best(reports[:count]))


def _validate(setup: TrainingSetup, weights: dict[str, Tensor]) -> RankingMetrics:
    """Rank the validation events in the main process and broadcast the metrics."""
    metrics = RankingMetrics(0, 0, 0, 0)
    if setup.group.is_main:
        metrics = evaluate_ranking(StrategyRecommender(setup.ranker(weights)), setup.validation_events, K)
    numbers = setup.group.broadcast([metrics.hit_rate, metrics.ndcg, metrics.mrr])
    return RankingMetrics(len(setup.validation_events), *numbers)


def _calibrate(setup: TrainingSetup, weights: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Return the calibration of the best validated model, in the main process alone.

    The refitted model keeps it, because it has been trained on all labels.
    """
    if not setup.group.is_main:
        return [IDENTITY] * len(TASKS)
    rules = setup.label_rules
    labels = held_out_labels(setup.train, setup.fit, setup.validation_mask, rules)
    ring_events = setup.pipeline.ring_events
    return fit_calibration(setup.ranker(weights), setup.train, labels, rules, ring_events, setup.options.trainer.seed)


def _refit(
    setup: TrainingSetup, path: Path, callback: TrainingCallback, state: TrainingState, saved: Checkpoint | None
) -> dict[str, Tensor]:
    """Train from scratch on all training events for the best number of epochs; return the weights."""
    epochs = _best(state.reports).epoch
    trainer = setup.trainer(setup.train, epochs)
    if saved and state.refitting:
        tensors, _ = saved
        trainer.restore(tensors)
    state.refitting = True
    callback.phase("refit on all training events: epoch", epochs)
    while trainer.epochs_done < epochs:
        _train_epoch(trainer, callback)
        if setup.group.is_main:
            checkpoint.save(path, trainer.state(), state)
    return trainer.weights()


def _train_epoch(trainer: Trainer, callback: TrainingCallback) -> float:
    """Train one more epoch and return its mean loss.

    TrainingError when a loss or a weight becomes infinite or NaN; no checkpoint is written then.
    """
    epoch = trainer.epochs_done + 1
    diverged = "training diverged; try a lower --learning-rate"

    def on_batch(loss: float, done: int, total: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(f"epoch {epoch}, batch {done} of {total}: loss is {loss}: {diverged}")
        callback.batch(epoch, loss, done, total)

    loss = trainer.train_epoch(on_batch)
    for name, weight in trainer.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise TrainingError(f"epoch {epoch}: {name} holds infinity or NaN: {diverged}")
    return loss


def _best(reports: list[EpochReport]) -> EpochReport:
    """Return the report of the highest NDCG; of equal ones the last.

    NDCG is less noisy than a hit rate over as many events; a later epoch has trained longer.
    """
    return max(reports, key=lambda report: (report.validation.ndcg, report.epoch))


def _should_stop(reports: list[EpochReport], options: TrainingOptions) -> bool:
    if len(reports) >= options.trainer.epochs:
        return True
    return bool(reports) and len(reports) - _best(reports).epoch >= options.patience


def _load_checkpoint(path: Path, setup: TrainingSetup) -> Checkpoint:
    tensors, state = checkpoint.load(path, TrainingState)
    if state.fingerprint != setup.fingerprint:
        raise TrainingError(
            f"checkpoint {path}: it belongs to a different log or different options; train without --resume"
        )
    return tensors, state
