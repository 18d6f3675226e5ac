"""Metrics of rankings and of predicted probabilities, from plain arrays."""

import msgspec
import numpy as np

PROBABILITY_FLOOR = 1e-6  # keeps the log loss of a float32 sigmoid finite
CALIBRATION_BINS = 15  # of equal mass (Guo et al., ICML 2017, take 15 of equal width: most would be empty here)


class RankingMetrics(msgspec.Struct, frozen=True):
    """Means over `events` events; an event without a hit counts 0.

    Each event has one relevant item, so NDCG is 1 / log2(1 + rank).
    """

    events: int
    hit_rate: float
    ndcg: float
    mrr: float


class CalibrationPoint(msgspec.Struct, frozen=True):
    """A bin of a reliability curve: mean probability and rate of positives among its `labels` labels."""

    labels: int
    probability: float
    positive_rate: float


class HeadMetrics(msgspec.Struct, frozen=True):
    """Metrics of a head's probability for the item that came next. `auc` is None where all labels are equal.

    ece: expected calibration error; reliability: its bins.
    """

    labels: int
    positive_rate: float | None
    auc: float | None
    log_loss: float | None
    ece: float | None = None
    reliability: list[CalibrationPoint] = []


def target_ranks(slates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return int [n]: each target's rank in its slate, from 1; 0 = not on it.

    slates: int [n, k]; targets: int [n], 0 = an item outside the vocabulary, which is on no slate.
    """
    hits = (slates == targets[:, None]) & (targets[:, None] > 0)
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


def ranking_metrics(ranks: np.ndarray, cutoff: int) -> RankingMetrics:
    """Average the gains of target_ranks' ranks, int [n]; a rank beyond the cutoff is not a hit."""
    means = gains(ranks, cutoff).sum(0) / max(1, len(ranks))
    return RankingMetrics(len(ranks), *means.tolist())


def gains(ranks: np.ndarray, cutoff: int) -> np.ndarray:
    """Return float64 [n, 3]: each rank's gain in hit rate, NDCG and MRR; 0 beyond the cutoff.

    ranks: int [n], 0 = none
    """
    is_hit = (ranks > 0) & (ranks <= cutoff)
    hit_ranks = np.where(is_hit, ranks, 1)
    return np.column_stack([np.ones(len(ranks)), 1 / np.log2(1 + hit_ranks), 1 / hit_ranks]) * is_hit[:, None]


def head_metrics(probabilities: np.ndarray, labels: np.ndarray) -> HeadMetrics:
    """Measure a head. probabilities: float [n] in (0, 1); labels: float [n], NaN = unknown, does not count."""
    is_labelled = np.isfinite(labels)
    if not is_labelled.any():
        return HeadMetrics(0, None, None, None)
    probabilities = probabilities[is_labelled].astype(np.float64)
    positive = labels[is_labelled] > 0.5
    clipped = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    log_loss = -np.where(positive, np.log(clipped), np.log1p(-clipped)).mean()
    return HeadMetrics(
        labels=len(probabilities),
        positive_rate=float(positive.mean()),
        auc=auc(probabilities, positive),
        log_loss=float(log_loss),
        ece=expected_calibration_error(probabilities, positive),
        reliability=calibration_curve(probabilities, positive),
    )


def calibration_curve(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> list[CalibrationPoint]:
    """Return the reliability curve in bins of equal mass, lowest probability first; fewer bins where labels are fewer.

    probabilities: float [n] in [0, 1]; labels: float [n], NaN = unknown, does not count. Equal probabilities may fall
    into two bins.
    """
    labelled = np.flatnonzero(np.isfinite(labels))
    order = labelled[np.argsort(probabilities[labelled], kind="stable")]
    members = np.array_split(order, min(bins, len(order))) if len(order) else []
    return [
        CalibrationPoint(
            labels=len(rows),
            probability=float(probabilities[rows].mean(dtype=np.float64)),
            positive_rate=float((labels[rows] > 0.5).mean()),
        )
        for rows in members
    ]


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> float | None:
    """Return mean |probability - positive rate| over calibration_curve's bins, weighted by labels; None without any."""
    curve = calibration_curve(probabilities, labels, bins)
    if not curve:
        return None
    errors = sum(point.labels * abs(point.probability - point.positive_rate) for point in curve)
    return errors / sum(point.labels for point in curve)


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the probability that a positive scores above a negative, ties counting half (Mann-Whitney).

    None without both.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, scores, "left")
    up_to = np.searchsorted(ordered, scores, "right")
    mean_ranks = (below + up_to + 1) / 2  # from 1
    return float((mean_ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))
