"""A batch's recommendations: slates per user, put together from what one or more strategies ranked."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np

from pipeline.serving.ranking import Part
from pipeline.slates import SlateItem, Why
from pipeline.strategies.strategy import RankedItems


class RankedSlates(NamedTuple):
    """A strategy's answer: ranked items per user, the same as columns, and the milliseconds of the last stage."""

    slates: list[list[SlateItem]]
    ranked: RankedItems
    rank_ms: float

    @classmethod
    def from_ranked(cls, ranked: RankedItems, item_ids: list[str], start_s: float) -> "RankedSlates":
        """Return the slates. item_ids: by token; start_s: of the last stage's part on the host, by perf_counter"""
        slates = _slate_items(ranked, item_ids)
        return cls(slates, ranked, ranked.rank_ms + 1e3 * (time.perf_counter() - start_s))


class Origin(NamedTuple):
    """The strategy that ranked a slate, its backend, and why it was taken."""

    strategy: str
    backend: str
    why: Why


@dataclass(slots=True)
class BatchResult:
    """A batch's recommendations in the order of its users.

    slates: ranked items per user; origins: per user
    ranked: the same as columns, one block per strategy and part of the users, with the milliseconds of its stages
    version: of the model that was serving when the batch was prepared
    rank_ms: the last stage's, from the strategy's retrieval to these slates
    """

    slates: list[list[SlateItem]]
    origins: list[Origin]
    ranked: list[RankedItems]
    version: str
    rank_ms: float

    @classmethod
    def from_parts(cls, parts: Sequence[Part[RankedSlates]], version: str) -> "BatchResult":
        """Put the parts of the users together."""
        slates: dict[int, list[SlateItem]] = {}
        origins: dict[int, Origin] = {}
        for part in parts:
            users = part.users.tolist()
            slates.update(zip(users, part.answer.slates, strict=True))
            origins.update(dict.fromkeys(users, Origin(part.strategy.name, part.strategy.backend, part.why)))
        return cls(
            [slates[user] for user in range(len(slates))],
            [origins[user] for user in range(len(slates))],
            [part.answer.ranked for part in parts],
            version,
            sum(part.answer.rank_ms for part in parts),
        )

    @property
    def features_ms(self) -> float:
        return sum(part.features_ms for part in self.ranked)

    @property
    def encode_ms(self) -> float:
        return sum(part.encode_ms for part in self.ranked)


def _slate_items(ranked: RankedItems, item_ids: list[str]) -> list[list[SlateItem]]:
    """Return the slates as Python objects: one `tolist` per column, one struct per item."""
    n, k = ranked.tokens.shape
    scores = np.round(ranked.scores.astype(np.float64), 5).tolist()
    sources = ranked.source.tolist() if isinstance(ranked.source, np.ndarray) else [[ranked.source] * k] * n
    if ranked.heads is None:
        heads = [[[None] * k] * n] * 3
    else:
        heads = np.round(ranked.heads.astype(np.float64), 5).transpose(2, 0, 1).tolist()
    slates: list[list[SlateItem]] = []
    for tokens, *columns in zip(ranked.tokens.tolist(), scores, *heads, sources, strict=True):
        items = list(map(SlateItem, [item_ids[token] for token in tokens], *columns))
        slates.append(items if 0 not in tokens else list(compress(items, tokens)))  # 0: no item was left
    return slates
