"""Sampled negatives: items that a user has not touched, among which older papers rank the wanted one.

Measures over a sample flatter weak rankers and can reverse the order of two (Krichene and Rendle, KDD 2020): they are
for comparison with published tables, the full ranking is for decisions.
"""

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.errors import EvaluationError
from pipeline.evaluation.ranking import Scored
from pipeline.features.event_features import ranges

CHUNK_KEYS = 1 << 22  # 32 MiB of float64 at a time


class Negatives(msgspec.Struct, frozen=True):
    """`count` items an event, drawn without repetition: all alike, or by their training events (and one more)."""

    count: Annotated[int, Meta(gt=0)] = 100
    seed: int = 0
    by: Literal["uniform", "popularity"] = "uniform"

    def __str__(self) -> str:
        return f"{self.count} {self.by} negatives, seed {self.seed}"


def sample_negatives(asked: Negatives, scored: Scored, counts: np.ndarray) -> np.ndarray:
    """int32 [n, count]: of each scored event, tokens that its user touches nowhere in the corpus.

    counts: int [items], training events by token. EvaluationError when a user leaves too few items untouched. By
    exponential races (Efraimidis and Spirakis 2006): the keys -log(u) / weight of all items, the lowest win.
    """
    corpus, users, random = scored.corpus, scored.users, np.random.default_rng(asked.seed)
    weights = np.ones(len(counts)) if asked.by == "uniform" else counts + 1.0
    drawn = np.empty((len(scored), asked.count), np.int32)
    step = max(1, CHUNK_KEYS // len(counts))
    for start in range(0, len(scored), step):
        rows = users[start : start + step]
        keys = random.exponential(size=(len(rows), len(counts))) / weights
        keys[_touched(corpus.offsets, corpus.tokens, rows)] = np.inf
        keys[:, 0] = np.inf
        _check(asked, np.isfinite(keys).sum(1))
        drawn[start : start + step] = np.argpartition(keys, asked.count - 1, axis=1)[:, : asked.count]
    return drawn


def _touched(offsets: np.ndarray, tokens: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, token) of every event of these users."""
    lengths = offsets[users + 1] - offsets[users]
    index, _ = ranges(offsets[users], lengths)
    return np.repeat(np.arange(len(users)), lengths), tokens[index]


def _check(asked: Negatives, untouched: np.ndarray) -> None:
    if (fewest := int(untouched.min())) < asked.count:
        raise EvaluationError(
            f"negatives: {asked.count} are asked for, but a user leaves only {fewest} of the log's items untouched;"
            " ask for fewer, or rank all items"
        )
