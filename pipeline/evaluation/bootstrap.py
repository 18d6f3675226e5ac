"""Bootstrap confidence of a mean over events, resampled by user, since one user's events are dependent.

The same seed draws the same users, so two columns of one call are paired: the difference of their resampled means has
the interval of the difference (Efron and Tibshirani 1993, chapters 13 and 22).
"""

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
CHUNK_DRAWS = 1 << 22


def resampled_means(values: np.ndarray, users: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return float64 [resamples, m]: the columns' means over the events of n users drawn with replacement from n.

    values: float [n, m]; users: int [n], each event's user. A mean weighs a user by the number of events.
    """
    _, rows = np.unique(users, return_inverse=True)
    n_users = int(rows.max(initial=-1)) + 1
    sums = np.zeros((n_users, values.shape[1] + 1))  # the last column counts the user's events
    np.add.at(sums, rows, np.column_stack([values, np.ones(len(values))]))
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_DRAWS // max(1, n_users))
    chunks = [_resample(rng, min(step, resamples - start), sums) for start in range(0, resamples, step)]
    totals = np.concatenate(chunks)
    return totals[:, :-1] / np.maximum(totals[:, -1:], 1)


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentiles that hold `level` of the samples between them, along the first axis."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _resample(rng: np.random.Generator, resamples: int, sums: np.ndarray) -> np.ndarray:
    """Return float64 [resamples, m]: the sums over users drawn with replacement."""
    users = len(sums)
    draws = rng.integers(0, max(1, users), (resamples, users)) + users * np.arange(resamples)[:, None]
    counts = np.bincount(draws.ravel(), minlength=resamples * users).reshape(resamples, users)
    return counts @ sums
