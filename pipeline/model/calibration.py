"""Calibration of the heads: Platt scaling of their logits, fitted on labels that the model was not trained on.

probability = sigmoid(scale * logit + shift); with shift 0 this is temperature scaling (Platt 1999; Guo et al., ICML
2017). A scale above 0 keeps every order: a head's AUC does not change.

A user's labels depend on each other: all events of a session have the same next session. On a simulated shop 11,000
labels of returns within eight days told as much as 1,000 independent ones, and a scaling fitted to them followed the
week instead of the head. So a head is scaled only if its labels, taken user by user, show that it needs it.
"""

import numpy as np

from pipeline.errors import ArtifactError

IDENTITY = (1.0, 0.0)
# The weight of a prior at IDENTITY, in labels: with few labels the scaling stays near the head's own output.
PRIOR_LABELS = 20.0
NEWTON_STEPS = 25  # from IDENTITY it takes 4 to 6
MIN_USERS = 10  # with fewer, their spread says nothing
MIN_WALD = 5.99  # the 95 % quantile of chi-squared with two degrees of freedom


def fit_platt(logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> tuple[float, float]:
    """Return the scale and shift of the lowest log loss.

    logits, labels: float [n], labels of NaN are ignored; users: int [n], each label's user
    Returns IDENTITY where all labels are equal, where they do not show at 95 % that the head is off, or where the best
    scale would reverse the order.
    """
    labelled = np.isfinite(labels)
    x = np.stack([logits[labelled].astype(np.float64), np.ones(labelled.sum())], axis=1)  # [n, 2]
    targets = labels[labelled].astype(np.float64)
    if len(np.unique(targets)) < 2:
        return IDENTITY
    theta = np.array(IDENTITY)
    for _ in range(NEWTON_STEPS):
        scores, hessian = _derivatives(x, targets, theta)
        theta = theta + np.linalg.solve(hessian, scores.sum(0) - PRIOR_LABELS * (theta - IDENTITY))
    scale, shift = theta.tolist()
    scores, hessian = _derivatives(x, targets, theta)
    is_needed = scale > 0 and _wald(theta - IDENTITY, hessian, scores, users[labelled]) > MIN_WALD
    return (scale, shift) if is_needed else IDENTITY


def _derivatives(x: np.ndarray, targets: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels' gradients of the log likelihood, [n, 2], and minus its Hessian with the prior's, [2, 2]."""
    probabilities = 1 / (1 + np.exp(-np.clip(x @ theta, -40, 40)))
    hessian = (x.T * (probabilities * (1 - probabilities))) @ x + PRIOR_LABELS * np.eye(2)
    return x * (targets - probabilities)[:, None], hessian


def _wald(difference: np.ndarray, hessian: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """Return the Wald statistic of a difference, float [2], with a covariance by users (Liang and Zeger 1986).

    scores, hessian: of _derivatives. 0 for too few users to tell.
    """
    _, rows = np.unique(users, return_inverse=True)
    sums = np.zeros((int(rows.max()) + 1, 2))
    if len(sums) < MIN_USERS:
        return 0.0
    np.add.at(sums, rows, scores)
    bread = np.linalg.inv(hessian)
    covariance = bread @ (sums.T @ sums) @ bread * len(sums) / (len(sums) - 1)
    return float(difference @ np.linalg.solve(covariance, difference))


def check_calibration(calibration: np.ndarray, version: str) -> None:
    """Raise ArtifactError unless an artifact's scales and shifts, float [tasks, 2], are finite and keep every order."""
    if not np.isfinite(calibration).all() or (calibration[:, 0] <= 0).any():
        raise ArtifactError(
            f"artifact {version}: heads.calibration is {calibration.tolist()}, want finite numbers and scales above 0;"
            " make a new one with `millrace train LOG --out DIR`"
        )
