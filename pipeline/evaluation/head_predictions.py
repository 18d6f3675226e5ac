"""The heads asked about events of a log, each just before it: what measures them, and what calibrates them."""

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.features.labels import TASKS, compute_labels
from pipeline.model.calibration import fit_platt
from pipeline.records import EventSchema
from pipeline.serving.hstu_strategy import HstuStrategy

MAX_CALIBRATION_EVENTS = 8000  # at most: two numbers a head are fitted to them


def predict_heads(hstu: HstuStrategy, events: HeldOutEvents) -> np.ndarray:
    """float32 [n, 3] by labels.TASKS: of each event's item, from the events before it; none is its user's first."""
    odds = np.empty((len(events), len(TASKS)), np.float32)
    for chosen, histories in events.batches():
        odds[chosen] = hstu.probabilities(histories, events.targets[chosen, None])[:, 0]
    return odds


def fit_calibration(
    hstu: HstuStrategy, known: UserSequences, labels: np.ndarray, seed: int
) -> list[tuple[float, float]]:
    """Scale and shift of each head. hstu: not calibrated; labels: float [total, 3], those it has not learnt from."""
    positions = np.random.default_rng(seed).permutation(np.flatnonzero(np.isfinite(labels).any(axis=1)))
    positions = np.sort(positions[:MAX_CALIBRATION_EVENTS])
    odds = predict_heads(hstu, HeldOutEvents(known, positions + 1, hstu.max_events)).astype(np.float64)
    logits = np.log(np.clip(odds, 1e-6, 1 - 1e-6)) - np.log1p(-np.clip(odds, 1e-6, 1 - 1e-6))
    return [fit_platt(logits[:, task], labels[positions, task]) for task in range(len(TASKS))]


def held_out_labels(
    known: UserSequences, fit: UserSequences, validation: np.ndarray, schema: EventSchema
) -> np.ndarray:
    """float32 [total, 3] labels of `known`, NaN where `fit`, its part outside of `validation`, tells them already.

    validation: bool [total]. These are the labels of what happens in the validation slice; of returns, a horizon's
    earlier ones, which the slice's end is the first to tell.
    """
    labels = _labels(known, schema)
    learnt = np.zeros(labels.shape, bool)
    learnt[~validation] = np.isfinite(_labels(fit, schema))  # both run user after user
    return np.where(learnt, np.nan, labels)


def _labels(corpus: UserSequences, schema: EventSchema) -> np.ndarray:
    return compute_labels(corpus.histories, schema, int(corpus.histories.ts_ms.max(initial=0)))
