"""Sampled negatives: items that a user has not touched, among which older papers rank the target.

Metrics over a sample flatter weak rankers and can reverse the order of two (Krichene and Rendle, KDD 2020): use them
to compare with published tables, and the full ranking for decisions.
"""

from typing import Literal

import msgspec
import numpy as np

from pipeline.errors import EvaluationError
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.jagged import ranges
from pipeline.types import PositiveInt

CHUNK_KEYS = 1 << 22  # 32 MiB of float64 at a time


class NegativeSampling(msgspec.Struct, frozen=True):
    """`count` items per event, without repetition: uniform, or in proportion to training events plus one."""

    count: PositiveInt = 100
    seed: int = 0
    distribution: Literal["uniform", "popularity"] = "uniform"

    def __str__(self) -> str:
        return f"{self.count} {self.distribution} negatives, seed {self.seed}"


def sample_negatives(sampling: NegativeSampling, test: HeldOutEvents, counts: np.ndarray) -> np.ndarray:
    """Return int32 [n, count]: for each test event, tokens that its user touches nowhere in the sequences.

    counts: int [items], training events by token. EvaluationError when a user leaves too few items untouched. Draws by
    exponential races (Efraimidis and Spirakis 2006): of the keys -log(u) / weight of all items, the lowest win.
    """
    rng = np.random.default_rng(sampling.seed)
    users = test.users
    weights = np.ones(len(counts)) if sampling.distribution == "uniform" else counts + 1.0
    negatives = np.empty((len(test), sampling.count), np.int32)
    step = max(1, CHUNK_KEYS // len(counts))
    for start in range(0, len(test), step):
        rows = users[start : start + step]
        keys = rng.exponential(size=(len(rows), len(counts))) / weights
        keys[_touched(test.sequences.offsets, test.sequences.tokens, rows)] = np.inf
        keys[:, 0] = np.inf
        _check(sampling, np.isfinite(keys).sum(1))
        negatives[start : start + step] = np.argpartition(keys, sampling.count - 1, axis=1)[:, : sampling.count]
    return negatives


def _touched(offsets: np.ndarray, tokens: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, token) of every event of these users."""
    lengths = offsets[users + 1] - offsets[users]
    index, _ = ranges(offsets[users], lengths)
    return np.repeat(np.arange(len(users)), lengths), tokens[index]


def _check(sampling: NegativeSampling, untouched: np.ndarray) -> None:
    if (fewest := int(untouched.min())) < sampling.count:
        raise EvaluationError(
            f"negatives: {sampling.count} requested, but one user has only {fewest} untouched items in the log;"
            " request fewer, or rank all items"
        )
