"""The ladder of rungs and who is asked next: an answer always comes.

A rung that raises is left out for a while, then probed by one batch; meanwhile the next rung answers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from pipeline.records import Histories

FALLBACK_ORDER = ("unified", "tensorrt", "vllm", "hstu", "simple")  # best first
COOLDOWN_S = 30.0  # a failed rung's pause before the next probe


@dataclass(slots=True)
class RankedItems:
    """A rung's answer to a packed batch of n users; rows are padded with token 0 where a catalogue has no k items left.

    tokens: int32 [n, k]; scores: float32 [n, k]; heads: float32 [n, k, 3] engagement, retention, monetization, or None
    source: object array of str [n, k] or one name for all
    values: float32 [n, k], what each item usually brings, 0 = unknown; None: the rung does not know
    """

    COLUMNS: ClassVar = ("tokens", "scores", "heads", "source", "values")

    tokens: np.ndarray
    scores: np.ndarray
    heads: np.ndarray | None
    source: np.ndarray | str
    features_ms: float = 0.0
    encode_ms: float = 0.0
    rank_ms: float = 0.0
    values: np.ndarray | None = None

    def first(self, k: int) -> "RankedItems":
        """The first k ranks."""
        if self.tokens.shape[1] <= k:
            return self
        cut = {name: column[:, :k] for name in self.COLUMNS if isinstance(column := getattr(self, name), np.ndarray)}
        return replace(self, **cut)


class Strategy(Protocol):
    """One strategy of the ladder. Raises anything when it cannot answer; the next rung is asked then."""

    name: str

    def rank(self, histories: Histories, k: int) -> RankedItems: ...


class FallbackChain:
    """The rungs that this process has, best first, each behind a breaker."""

    def __init__(self, strategies: Mapping[str, Strategy], monotonic: Callable[[], float]) -> None:
        self._strategies = {name: strategies[name] for name in FALLBACK_ORDER if name in strategies}
        self._monotonic = monotonic
        self._open_until_s = dict.fromkeys(self._strategies, 0.0)

    def __contains__(self, name: str) -> bool:
        return name in self._strategies

    def candidates(self, requested: str | None) -> Iterator[Strategy]:
        """From the asked rung (None: the best) downward; those whose breaker is open are skipped, but for the last."""
        start = FALLBACK_ORDER.index(requested) if requested else 0
        names = [name for name in self._strategies if FALLBACK_ORDER.index(name) >= start]
        for name in names:
            if name == names[-1] or self._monotonic() >= self._open_until_s[name]:
                yield self._strategies[name]

    def record_failure(self, rung: Strategy) -> None:
        self._open_until_s[rung.name] = self._monotonic() + COOLDOWN_S

    def record_success(self, rung: Strategy) -> None:
        self._open_until_s[rung.name] = 0.0
