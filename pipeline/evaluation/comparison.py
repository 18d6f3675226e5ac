"""Several rankers over the same events: metrics at each cutoff and paired differences, all with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.evaluation.bootstrap import interval, resampled_means
from pipeline.evaluation.metrics import gains


class Estimate(msgspec.Struct, frozen=True):
    """A mean over events and its 95 % interval over users."""

    value: float
    low: float
    high: float


class Estimates(msgspec.Struct, frozen=True):
    """Estimates in the order of the columns of metrics.gains."""

    hit_rate: Estimate
    ndcg: Estimate
    mrr: Estimate


@dataclass(slots=True)
class Comparison:
    """Means and bootstrap samples by ranker.

    means: float64 [cutoffs, 3]; samples: float64 [resamples, cutoffs, 3], of the same users for all rankers
    """

    cutoffs: tuple[int, ...]
    means: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]

    @classmethod
    def from_ranks(
        cls, ranks: Mapping[str, np.ndarray], users: np.ndarray, cutoffs: tuple[int, ...], resamples: int, seed: int
    ) -> "Comparison":
        """Compare rankers by the ranks of the targets.

        ranks: int [n] per ranker, 0 = none; users: int [n], each event's user.
        """
        comparison = cls(cutoffs, {}, {})
        for name, target_ranks in ranks.items():
            values = np.concatenate([gains(target_ranks, cutoff) for cutoff in cutoffs], axis=1)  # [n, cutoffs * 3]
            samples = resampled_means(values, users, resamples, seed)
            comparison.means[name] = values.mean(0).reshape(len(cutoffs), -1)
            comparison.samples[name] = samples.reshape(resamples, len(cutoffs), -1)
        return comparison

    def at(self, name: str) -> dict[int, Estimates]:
        """Return a ranker's metrics by cutoff."""
        return self._estimates(self.means[name], self.samples[name])

    def difference(self, name: str, other: str) -> dict[int, Estimates]:
        """Return by cutoff `name` minus `other`, paired by user, so shared difficulty cancels out."""
        return self._estimates(self.means[name] - self.means[other], self.samples[name] - self.samples[other])

    def _estimates(self, means: np.ndarray, samples: np.ndarray) -> dict[int, Estimates]:
        columns = np.stack([means, *interval(samples)], axis=-1).tolist()  # [cutoffs, 3, (value, low, high)]
        return {
            cutoff: Estimates(*(Estimate(*bounds) for bounds in row))
            for cutoff, row in zip(self.cutoffs, columns, strict=True)
        }
