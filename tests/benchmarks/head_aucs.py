"""AUCs of two models over several heads, compared in pairs: both are resampled with the same users."""

import numpy as np

from pipeline.evaluation.bootstrap import interval

RESAMPLES = 400


def mean_auc_gain(
    ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray, users: np.ndarray
) -> tuple[float, float, float]:
    """Return by how much the mean AUC of `ours` exceeds that of `theirs`, and the bounds of its 95 % interval.

    ours, theirs: float [n, heads], probabilities; labels: float [n, heads], NaN = unknown; users: int [n]. Resamples in
    which a head has labels of one kind only are left out.
    """
    _, rows = np.unique(users, return_inverse=True)
    count = int(rows.max()) + 1
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    weights = np.concatenate([np.ones((1, len(rows))), draws[:, rows]])  # first: every event once
    ours_auc, theirs_auc = (
        np.mean([weighted_aucs(model[:, head], labels[:, head], weights) for head in range(labels.shape[1])], axis=0)
        for model in (ours, theirs)
    )
    gains = ours_auc - theirs_auc
    low, high = interval(gains[1:][np.isfinite(gains[1:])])
    return float(gains[0]), float(low), float(high)


def weighted_aucs(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return float64 [m]: the AUC with each event counted by its weight, NaN if a kind of label has no weight.

    probabilities, labels: float [n]; weights: float [m, n]. Equal probabilities are ordered as they come.
    """
    labelled = np.flatnonzero(~np.isnan(labels))
    order = labelled[np.argsort(probabilities[labelled], kind="stable")]
    positive = labels[order] > 0
    aucs = np.full(len(weights), np.nan)
    for number, row in enumerate(weights[:, order]):
        below = np.cumsum(row * ~positive)
        pairs = (row * positive).sum() * below[-1]
        if pairs:
            aucs[number] = (row * positive * below).sum() / pairs
    return aucs
