"""Several rankers over the same events: their measures at each cutoff, and how sure each and each difference is."""

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
    """In the order of measures.gains' columns."""

    hit_rate: Estimate
    ndcg: Estimate
    mrr: Estimate


@dataclass(slots=True)
class Comparison:
    """means: float64 [cutoffs, 3] of each ranker; samples: float64 [resamples, cutoffs, 3], the same users in all."""

    cutoffs: tuple[int, ...]
    means: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]

    @classmethod
    def from_ranks(cls, ranks: Mapping[str, np.ndarray], users: np.ndarray, cutoffs: tuple[int, ...], resamples: int,
           seed: int) -> "Comparison":  # fmt: skip
        """ranks: int [n] of each ranker, 0 = none; users: int [n], each event's user."""
        made = cls(cutoffs, {}, {})
        for name, places in ranks.items():
            values = np.concatenate([gains(places, cutoff) for cutoff in cutoffs], axis=1)  # [n, cutoffs * 3]
            made.means[name] = values.mean(0).reshape(len(cutoffs), -1)
            made.samples[name] = resampled_means(values, users, resamples, seed).reshape(resamples, len(cutoffs), -1)
        return made

    def at(self, name: str) -> dict[int, Estimates]:
        """By cutoff."""
        return self._estimates(self.means[name], self.samples[name])

    def difference(self, name: str, other: str) -> dict[int, Estimates]:
        """By cutoff, what `name` has more than `other`: paired, so that what all find hard does not blur it."""
        return self._estimates(self.means[name] - self.means[other], self.samples[name] - self.samples[other])

    def _estimates(self, means: np.ndarray, samples: np.ndarray) -> dict[int, Estimates]:
        columns = np.stack([means, *interval(samples)], axis=-1).tolist()  # [cutoffs, 3, (value, low, high)]
        return {
            cutoff: Estimates(*(Estimate(*bounds) for bounds in row))
            for cutoff, row in zip(self.cutoffs, columns, strict=True)
        }
