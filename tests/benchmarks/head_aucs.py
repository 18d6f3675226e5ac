"""Two models' AUCs over several heads, compared in pairs: users are drawn with replacement, the same for both."""

import numpy as np

from pipeline.evaluation.bootstrap import interval

RESAMPLES = 400


def mean_auc_gain(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, users: np.ndarray
) -> tuple[float, float, float]:
    """How far the mean AUC of `ours` is above that of `theirs`, and the ends of its 95 % interval.

    ours, theirs: float [n, heads], odds; labels: float [n, heads], NaN = not known; users: int [n]. Draws where a head
    has labels of one kind only are left out.
    """
    _, rows = np.unique(users, return_inverse=True)
    count = int(rows.max()) + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, len(rows))), drawn[:, rows]])  # the first: every event once
    ours_auc, theirs_auc = (
        np.mean([weighted_aucs(odds[:, head], labels[:, head], weights) for head in range(labels.shape[1])], axis=0)
        for odds in (ours, theirs)
    )
    gains = ours_auc - theirs_auc
    low, high = interval(gains[1:][np.isfinite(gains[1:])])
    return float(gains[0]), float(low), float(high)


def weighted_aucs(odds: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [m]: the AUC with each event counted by its weight, float [m, n]; NaN where one kind of label weighs
    nothing. Equal odds count by the order they stand in."""
    known = np.flatnonzero(~np.isnan(labels))
    order = known[np.argsort(odds[known], kind="stable")]
    positive = labels[order] > 0
    aucs = np.full(len(weights), np.nan)
    for number, row in enumerate(weights[:, order]):
        below = np.cumsum(row * ~positive)
        pairs = (row * positive).sum() * below[-1]
        if pairs:
            aucs[number] = (row * positive * below).sum() / pairs
    return aucs
