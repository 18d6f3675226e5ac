"""Calibration of the heads: Platt scaling of their logits, fitted on labels that the model was not trained on.

probability = sigmoid(scale * logit + shift); with shift 0 this is temperature scaling (Platt 1999; Guo et al., ICML
2017). A scale above 0 keeps every order: a head's AUC does not change.
"""

import numpy as np

from pipeline.errors import ArtifactError

IDENTITY = (1.0, 0.0)
# The weight of a prior at IDENTITY, in labels: with few labels the scaling stays near the head's own output.
PRIOR_LABELS = 20.0
NEWTON_STEPS = 25  # from IDENTITY it takes 4 to 6


def fit_platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the scale and shift of the lowest log loss. logits, labels: float [n]; labels of NaN are ignored.

    Returns IDENTITY where all labels are equal, or where the best scale would reverse the order.
    """
    labelled = np.isfinite(labels)
    x = np.stack([logits[labelled].astype(np.float64), np.ones(labelled.sum())], axis=1)  # [n, 2]
    targets = labels[labelled].astype(np.float64)
    if targets.min(initial=1) == targets.max(initial=0):
        return IDENTITY
    theta = np.array(IDENTITY)
    for _ in range(NEWTON_STEPS):
        probabilities = 1 / (1 + np.exp(-np.clip(x @ theta, -40, 40)))
        gradient = x.T @ (probabilities - targets) + PRIOR_LABELS * (theta - IDENTITY)
        hessian = (x.T * (probabilities * (1 - probabilities))) @ x + PRIOR_LABELS * np.eye(2)
        theta = theta - np.linalg.solve(hessian, gradient)
    scale, shift = theta.tolist()
    return (scale, shift) if scale > 0 else IDENTITY


def check_calibration(calibration: np.ndarray, version: str) -> None:
    """Raise ArtifactError unless an artifact's scales and shifts, float [tasks, 2], are finite and keep every order."""
    if not np.isfinite(calibration).all() or (calibration[:, 0] <= 0).any():
        raise ArtifactError(
            f"artifact {version}: heads.calibration is {calibration.tolist()}, want finite numbers and scales above 0;"
            " make a new one with `millrace train LOG --out DIR`"
        )
