"""Head predictions for logged events, each from the events before it, for the heads' metrics and calibration."""

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.metrics import PROBABILITY_FLOOR
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.features.labels import TASKS, LabelRules, compute_log_labels
from pipeline.model.calibration import fit_platt
from pipeline.strategies.hstu_strategy import HstuStrategy

MAX_CALIBRATION_EVENTS = 8000  # two numbers per head are fitted to them


def predict_heads(hstu: HstuStrategy, events: HeldOutEvents) -> np.ndarray:
    """Return float32 [n, 3] probabilities by labels.TASKS for each event's item. No event may be its user's first."""
    probabilities = np.empty((len(events), len(TASKS)), np.float32)
    for rows, histories in events.batches():
        probabilities[rows] = hstu.probabilities(histories, events.targets[rows, None])[:, 0]
    return probabilities


def fit_calibration(
    hstu: HstuStrategy, train: UserSequences, labels: np.ndarray, rules: LabelRules, ring_events: int, seed: int
) -> list[tuple[float, float]]:
    """Return scale and shift of each head, fitted to its probabilities for rings of `ring_events`, as in serving.

    hstu: not calibrated
    labels: by these rules, float [total, 3], NaN where the model was trained on the label or none exists
    """
    positions = np.random.default_rng(seed).permutation(np.flatnonzero(np.isfinite(labels).any(axis=1)))
    positions = np.sort(positions[:MAX_CALIBRATION_EVENTS])
    events = HeldOutEvents(train, positions + 1, ring_events)
    probabilities = predict_heads(hstu, events).astype(np.float64)
    probabilities = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    logits = np.log(probabilities) - np.log1p(-probabilities)
    groupings = {task: [events.users] for task in TASKS}
    # Labels of one time overlap: they are about the same days.
    groupings["retention"].append(train.histories.ts_ms[events.positions] // max(rules.retention_ms, 1))
    return [fit_platt(logits[:, n], labels[positions, n], *groupings[task]) for n, task in enumerate(TASKS)]


def held_out_labels(train: UserSequences, fit: UserSequences, validation: np.ndarray, rules: LabelRules) -> np.ndarray:
    """Return float32 [total, 3], the labels of `train` with NaN where `fit`, its part before validation, has them.

    validation: bool [total], the validation slice. The remaining labels are those of events in the slice
    and, for retention, of events up to a horizon before it, which the slice decides.
    """
    labels = compute_log_labels(train.histories, rules)
    is_trained = np.zeros(labels.shape, bool)
    # `fit` has the rows before validation in the same order: both are grouped by user.
    is_trained[~validation] = np.isfinite(compute_log_labels(fit.histories, rules))
    return np.where(is_trained, np.nan, labels)
