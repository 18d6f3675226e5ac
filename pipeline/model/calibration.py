"""Calibration of the heads: Platt scaling of their logits, fitted on labels that the model was not trained on.

probability = sigmoid(scale * logit + shift); with shift 0 this is temperature scaling (Platt 1999; Guo et al., ICML
2017). A scale above 0 keeps every order: a head's AUC does not change.

Labels depend on each other: all events of a user's session have the same next session, and labels of the returns of a
week share that week. A scaling fitted to one week's returns follows that week instead of the head. So a head is scaled
only if its labels show that it needs it even if those of one user, or of one week, count as one.
"""

import numpy as np

from pipeline.errors import ArtifactError

IDENTITY = (1.0, 0.0)
# The weight of a prior at IDENTITY, in labels: with few labels the scaling stays near the head's own output.
PRIOR_LABELS = 20.0
NEWTON_STEPS = 50  # from IDENTITY it takes 4 to 12
STEP_HALVINGS = 30
MIN_GRADIENT = 1e-6  # in labels: below, the minimum is reached
SIGNIFICANCE = 0.05


def fit_platt(logits: np.ndarray, labels: np.ndarray, *groupings: np.ndarray) -> tuple[float, float]:
    """Return the scale and shift of the lowest log loss.

    logits, labels: float [n], labels of NaN are ignored
    groupings: int [n] each, say each label's user: labels of one group may depend on each other
    Returns IDENTITY where all labels are equal, where they do not show at 95 % that the head is off, or where the best
    scale would reverse the order.
    """
    labelled = np.isfinite(labels)
    x = np.stack([logits[labelled].astype(np.float64), np.ones(labelled.sum())], axis=1)  # [n, 2]
    targets = labels[labelled].astype(np.float64)
    if len(np.unique(targets)) < 2:
        return IDENTITY
    theta = _minimise(x, targets)
    scale, shift = theta.tolist()
    scores, hessian = _derivatives(x, targets, theta)
    steps = scores @ np.linalg.inv(hessian)  # by how much each label moved theta
    is_needed = scale > 0 and all(_is_significant(theta - IDENTITY, steps, groups[labelled]) for groups in groupings)
    return (scale, shift) if is_needed else IDENTITY


def _minimise(x: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the theta, float [2], of the lowest log loss with the prior, by Newton's method.

    A step that would raise the loss is halved: where a head is far off, whole steps would jump to and fro for ever.
    """
    theta = np.array(IDENTITY)
    for _ in range(NEWTON_STEPS):
        scores, hessian = _derivatives(x, targets, theta)
        gradient = scores.sum(0) - PRIOR_LABELS * (theta - IDENTITY)
        if np.abs(gradient).max() < MIN_GRADIENT:
            break
        step = np.linalg.solve(hessian, gradient)
        loss = _loss(x, targets, theta)
        for _ in range(STEP_HALVINGS):
            if _loss(x, targets, theta + step) <= loss:
                break
            step = step / 2
        theta = theta + step
    return theta


def _loss(x: np.ndarray, targets: np.ndarray, theta: np.ndarray) -> float:
    """Return the sum of the labels' log losses, and of the prior's."""
    logits = x @ theta
    prior = PRIOR_LABELS / 2 * np.square(theta - IDENTITY).sum()
    return float((np.logaddexp(0, logits) - targets * logits).sum() + prior)


def _derivatives(x: np.ndarray, targets: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels' gradients of the log likelihood, [n, 2], and minus its Hessian with the prior's, [2, 2]."""
    probabilities = 1 / (1 + np.exp(-np.clip(x @ theta, -40, 40)))
    hessian = (x.T * (probabilities * (1 - probabilities))) @ x + PRIOR_LABELS * np.eye(2)
    return x * (targets - probabilities)[:, None], hessian


def _is_significant(difference: np.ndarray, steps: np.ndarray, groups: np.ndarray) -> bool:
    """Whether a difference, float [2], is not 0 at SIGNIFICANCE, if labels of one group depend on each other.

    Hotelling's test on the groups' steps: a Wald test with a covariance by groups (Liang and Zeger 1986) whose bound
    grows as groups get few. It is exact for groups of one size; of few very unequal ones it finds too much. With two
    groups or fewer nothing is significant.

    steps: float [n, 2], of each label; groups: int [n]
    """
    _, rows = np.unique(groups, return_inverse=True)
    count = int(rows.max()) + 1
    if count <= len(difference):
        return False
    sums = np.zeros((count, len(difference)))
    np.add.at(sums, rows, steps)
    covariance = sums.T @ sums * count / (count - 1)
    statistic = float(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference)  # logits may be constant
    # (count - 1) times 2 / (count - 2) times the quantile of F with 2 and count - 2 degrees of freedom
    bound = (count - 1) * (SIGNIFICANCE ** (-2 / (count - 2)) - 1)
    return statistic > bound


def check_calibration(calibration: np.ndarray, version: str) -> None:
    """Raise ArtifactError unless an artifact's scales and shifts, float [tasks, 2], are finite and keep every order."""
    if not np.isfinite(calibration).all() or (calibration[:, 0] <= 0).any():
        raise ArtifactError(
            f"artifact {version}: heads.calibration is {calibration.tolist()}, want finite numbers and scales above 0;"
            " make a new one with `millrace train LOG --out DIR`"
        )
