"""Odds that come true: Platt's scaling of a head's logits, fitted on labels that the model has not learnt from.

odds = sigmoid(scale * logit + shift); with shift 0 that is temperature scaling (Platt 1999; Guo et al., ICML 2017).
A scale above 0 keeps every order: a head's AUC does not change.
"""

import numpy as np

from pipeline.errors import ArtifactError

IDENTITY = (1.0, 0.0)
# A prior at IDENTITY, worth as many labels: with few labels the scaling stays near what the head says itself.
PRIOR_LABELS = 20.0
NEWTON_STEPS = 25  # from IDENTITY it takes 4 to 6


def fit_platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Scale and shift of least log loss. logits: float [n]; labels: float [n], NaN = unknown, does not count.

    IDENTITY where the labels are all alike, or where the best scale would turn the order around.
    """
    known = np.isfinite(labels)
    x = np.stack([logits[known].astype(np.float64), np.ones(known.sum())], axis=1)  # [n, 2]
    positive = labels[known].astype(np.float64)
    if positive.min(initial=1) == positive.max(initial=0):
        return IDENTITY
    theta = np.array(IDENTITY)
    for _ in range(NEWTON_STEPS):
        odds = 1 / (1 + np.exp(-np.clip(x @ theta, -40, 40)))
        slope = x.T @ (odds - positive) + PRIOR_LABELS * (theta - IDENTITY)
        curvature = (x.T * (odds * (1 - odds))) @ x + PRIOR_LABELS * np.eye(2)
        theta = theta - np.linalg.solve(curvature, slope)
    scale, shift = theta.tolist()
    return (scale, shift) if scale > 0 else IDENTITY


def check_calibration(calibration: np.ndarray, name: str) -> None:
    """float [tasks, 2] of scales and shifts as an artifact holds them. ArtifactError unless they keep every order."""
    if not np.isfinite(calibration).all() or (calibration[:, 0] <= 0).any():
        raise ArtifactError(
            f"artifact {name}: heads.calibration is {calibration.tolist()}, want finite numbers and scales above 0;"
            " make a new one with `millrace train LOG --out DIR`"
        )
