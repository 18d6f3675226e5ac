"""Sampled negatives: items that a user has not touched, among which older papers rank the wanted one.

Measures over a sample flatter weak rankers and can reverse the order of two (Krichene and Rendle, KDD 2020): they are
for comparison with published tables, the full ranking is for decisions.
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
    """`count` items an event, drawn without repetition: all alike, or by their training events (and one more)."""

    count: PositiveInt = 100
    seed: int = 0
    distribution: Literal["uniform", "popularity"] = "uniform"

    def __str__(self) -> str:
        return f"{self.count} {self.distribution} negatives, seed {self.seed}"


def sample_negatives(sampling: NegativeSampling, test: HeldOutEvents, counts: np.ndarray) -> np.ndarray:
    """int32 [n, count]: of each scored event, tokens that its user touches nowhere in the corpus.

    counts: int [items], training events by token. EvaluationError when a user leaves too few items untouched. By
    exponential races (Efraimidis and Spirakis 2006): the keys -log(u) / weight of all items, the lowest win.
    """
    corpus, users, random = test.sequences, test.users, np.random.default_rng(sampling.seed)
    weights = np.ones(len(counts)) if sampling.distribution == "uniform" else counts + 1.0
    drawn = np.empty((len(test), sampling.count), np.int32)
    step = max(1, CHUNK_KEYS // len(counts))
    for start in range(0, len(test), step):
        rows = users[start : start + step]
        keys = random.exponential(size=(len(rows), len(counts))) / weights
        keys[_touched(corpus.offsets, corpus.tokens, rows)] = np.inf
        keys[:, 0] = np.inf
        _check(sampling, np.isfinite(keys).sum(1))
        drawn[start : start + step] = np.argpartition(keys, sampling.count - 1, axis=1)[:, : sampling.count]
    return drawn


def _touched(offsets: np.ndarray, tokens: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, token) of every event of these users."""
    lengths = offsets[users + 1] - offsets[users]
    index, _ = ranges(offsets[users], lengths)
    return np.repeat(np.arange(len(users)), lengths), tokens[index]


def _check(asked: NegativeSampling, untouched: np.ndarray) -> None:
    if (fewest := int(untouched.min())) < asked.count:
        raise EvaluationError(
            f"negatives: {asked.count} are asked for, but a user leaves only {fewest} of the log's items untouched;"
            " ask for fewer, or rank all items"
        )
