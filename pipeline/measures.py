"""How good a ranking or a probability was, from plain arrays."""

import msgspec
import numpy as np

PROBABILITY_FLOOR = 1e-6  # keeps the log loss of a float32 sigmoid finite


class RankingMeasures(msgspec.Struct, frozen=True):
    """Over `events` events, those without a hit counting 0. One relevant item each, so NDCG is 1 / log2(1 + rank)."""

    events: int
    hit_rate: float
    ndcg: float
    mrr: float


class HeadMeasures(msgspec.Struct, frozen=True):
    """Of a head's probability for the item that came next. `auc` is None where the labels are all alike."""

    labels: int
    positive_share: float | None
    auc: float | None
    log_loss: float | None


def ranks_of(slates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """slates: int [n, k]; wanted: int [n], 0 = an item in no slate -> place in the slate from 1, 0 = not there."""
    hits = (slates == wanted[:, None]) & (wanted[:, None] > 0)
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


def ranking_measures(ranks: np.ndarray) -> RankingMeasures:
    """From ranks_of's ranks, int [n]."""
    events = max(1, len(ranks))
    ranks = ranks[ranks > 0]
    ndcg, mrr = (1 / np.log2(1 + ranks)).sum() / events, (1 / ranks).sum() / events
    return RankingMeasures(events, len(ranks) / events, float(ndcg), float(mrr))


def head_measures(odds: np.ndarray, labels: np.ndarray) -> HeadMeasures:
    """odds: float [n] in (0, 1); labels: float [n], NaN = unknown, does not count."""
    known = np.isfinite(labels)
    odds, positive = odds[known].astype(np.float64), labels[known] > 0.5
    if not known.any():
        return HeadMeasures(0, None, None, None)
    bounded = np.clip(odds, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    log_loss = -np.where(positive, np.log(bounded), np.log1p(-bounded)).mean()
    return HeadMeasures(len(odds), float(positive.mean()), auc(odds, positive), float(log_loss))


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
