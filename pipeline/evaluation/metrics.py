"""How good a ranking or a probability was, from plain arrays."""

import msgspec
import numpy as np

PROBABILITY_FLOOR = 1e-6  # keeps the log loss of a float32 sigmoid finite
CALIBRATION_BINS = 15  # of equal mass (Guo et al., ICML 2017, take 15 of equal width: most would lie empty here)


class RankingMetrics(msgspec.Struct, frozen=True):
    """Over `events` events, those without a hit counting 0. One relevant item each, so NDCG is 1 / log2(1 + rank)."""

    events: int
    hit_rate: float
    ndcg: float
    mrr: float


class CalibrationPoint(msgspec.Struct, frozen=True):
    """A bin of a reliability curve: of `labels` known labels, what was promised and what came true."""

    labels: int
    probability: float
    positive_rate: float


class HeadMetrics(msgspec.Struct, frozen=True):
    """Of a head's probability for the item that came next. `auc` is None where the labels are all alike.

    ece: the expected calibration error; reliability: its bins.
    """

    labels: int
    positive_rate: float | None
    auc: float | None
    log_loss: float | None
    ece: float | None = None
    reliability: list[CalibrationPoint] = []


def target_ranks(slates: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """slates: int [n, k]; wanted: int [n], 0 = an item in no slate -> place in the slate from 1, 0 = not there."""
    hits = (slates == targets[:, None]) & (targets[:, None] > 0)
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


def ranking_metrics(ranks: np.ndarray, cutoff: int) -> RankingMetrics:
    """From ranks_of's ranks, int [n]; those beyond the cutoff are no hits."""
    means = gains(ranks, cutoff).sum(0) / max(1, len(ranks))
    return RankingMetrics(len(ranks), *means.tolist())


def gains(ranks: np.ndarray, cutoff: int) -> np.ndarray:
    """float64 [n, 3]: what each rank, int [n], 0 = none, is worth as a hit, in NDCG and in MRR; 0 beyond the cutoff."""
    within = (ranks > 0) & (ranks <= cutoff)
    places = np.where(within, ranks, 1)
    return np.column_stack([np.ones(len(ranks)), 1 / np.log2(1 + places), 1 / places]) * within[:, None]


def head_metrics(probabilities: np.ndarray, labels: np.ndarray) -> HeadMetrics:
    """odds: float [n] in (0, 1); labels: float [n], NaN = unknown, does not count."""
    known = np.isfinite(labels)
    probabilities, positive = probabilities[known].astype(np.float64), labels[known] > 0.5
    if not known.any():
        return HeadMetrics(0, None, None, None)
    bounded = np.clip(probabilities, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    log_loss = -np.where(positive, np.log(bounded), np.log1p(-bounded)).mean()
    return HeadMetrics(
        len(probabilities), float(positive.mean()), auc(probabilities, positive), float(log_loss),
        expected_calibration_error(probabilities, positive), calibration_curve(probabilities, positive),
    )  # fmt: skip


def calibration_curve(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> list[CalibrationPoint]:
    """The reliability curve, in bins of equal mass by odds, lowest first; fewer than `bins` where labels are fewer.

    odds: float [n] in [0, 1]; labels: float [n], NaN = unknown, does not count. Equal odds may meet in two bins.
    """
    known = np.flatnonzero(np.isfinite(labels))
    order = known[np.argsort(probabilities[known], kind="stable")]
    parts = np.array_split(order, min(bins, len(order))) if len(order) else []
    return [
        CalibrationPoint(
            len(part), float(probabilities[part].mean(dtype=np.float64)), float((labels[part] > 0.5).mean())
        )
        for part in parts
    ]


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> float | None:
    """Mean distance of what was promised from what came true over calibration_curve's bins; None without labels."""
    curve = calibration_curve(probabilities, labels, bins)
    total = sum(point.labels for point in curve)
    return (
        sum(point.labels * abs(point.probability - point.positive_rate) for point in curve) / total if total else None
    )


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, ties counting half (Mann-Whitney); None without both."""
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return None
    ordered = np.sort(scores)
    below, upto = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    mean_ranks = (below + upto + 1) / 2  # from 1
    return float((mean_ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))
