"""Means over scored events and trainings, with 95 % intervals that include both users and seeds.

Each resample draws users with replacement, the same ones for all rankings, and for each ranking as many of its
trainings as there are, also with replacement: so a difference is paired by user, and the luck of a seed widens its
interval. With few seeds the part that they add is estimated roughly, and rather too small.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.bootstrap import RESAMPLES, interval, resampled_means
from pipeline.evaluation.metrics import gains

CUTOFFS = (5, 10, 20, 50)
METRICS = ("hr", "ndcg", "mrr")  # in the order of the columns of `gains`
COLUMNS = tuple(f"{metric}{cutoff}" for cutoff in CUTOFFS for metric in METRICS)


@dataclass(slots=True)
class Estimate:
    """A ranking's means over events and seeds, float64 [COLUMNS], and their resamples, float64 [RESAMPLES, COLUMNS]."""

    means: np.ndarray
    samples: np.ndarray

    @classmethod
    def from_ranks(cls, ranks_by_seed: Sequence[np.ndarray], users: np.ndarray, seed: int) -> "Estimate":
        """ranks_by_seed: int [n] per training, 0 = not ranked; users: int [n], the same for all rankings.

        seed: of the draws of trainings, another one per ranking; the users' draws depend on `users` alone
        """
        by_seed = [_gains(ranks) for ranks in ranks_by_seed]
        columns = np.concatenate(by_seed, axis=1)  # [n, seeds * COLUMNS]
        samples = resampled_means(columns, users).reshape(RESAMPLES, len(by_seed), len(COLUMNS))
        drawn = np.random.default_rng(seed).integers(0, len(by_seed), (RESAMPLES, len(by_seed)))
        return cls(np.mean(by_seed, axis=(0, 1)), np.take_along_axis(samples, drawn[:, :, None], axis=1).mean(1))

    def at(self, column: str) -> tuple[float, float, float]:
        """Return the mean and the bounds of its interval."""
        index = COLUMNS.index(column)
        low, high = interval(self.samples[:, index])
        return float(self.means[index]), float(low), float(high)

    def gain_over(self, other: "Estimate", column: str) -> tuple[float, float, float] | None:
        """Return the relative gain over another ranking with its bounds; None where the other one has no hits."""
        index = COLUMNS.index(column)
        theirs = other.samples[:, index]
        if not theirs.all():
            return None
        low, high = interval(self.samples[:, index] / theirs - 1)
        return float(self.means[index] / other.means[index] - 1), float(low), float(high)


def _gains(ranks: np.ndarray) -> np.ndarray:
    """Return float64 [n, COLUMNS]."""
    return np.concatenate([gains(ranks, cutoff) for cutoff in CUTOFFS], axis=1)
