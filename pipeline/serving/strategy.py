"""Strategies and their fallback chain: every batch gets an answer.

A strategy that raises is skipped for a while, then probed with one batch; meanwhile the next strategy answers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from pipeline.records import Histories, Why

FALLBACK_ORDER = ("unified", "tensorrt", "vllm", "hstu", "simple")  # best first
COOLDOWN_S = 30.0  # from a strategy's failure to its next probe


@dataclass(slots=True)
class RankedItems:
    """A strategy's answer to a packed batch of n users, padded with token 0 where no items are left.

    tokens: int32 [n, k]; scores: float32 [n, k]
    heads: float32 [n, k, 3], probabilities of engagement, retention and monetization; None: the strategy has no model
    source: object array of str [n, k], or one name for all
    values: float32 [n, k], each item's usual value, 0 = unknown; None: the strategy does not know values
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
        """Return the first k ranks."""
        if self.tokens.shape[1] <= k:
            return self
        columns = {name: getattr(self, name) for name in self.COLUMNS}
        arrays = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
        return replace(self, **{name: column[:, :k] for name, column in arrays.items()})


class Strategy(Protocol):
    """One way to rank a batch. `name` is one of FALLBACK_ORDER.

    backend: the runtime it ranks with, such as `torch`, `kernels` or `numpy`; fixed once it is loaded
    """

    name: str
    backend: str

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """Rank k items per user. It may raise anything: then the next strategy ranks the batch."""
        ...


class FallbackChain:
    """The strategies of this process, best first, each behind a circuit breaker."""

    def __init__(self, strategies: Mapping[str, Strategy], monotonic: Callable[[], float]) -> None:
        self._strategies = {name: strategies[name] for name in FALLBACK_ORDER if name in strategies}
        self._monotonic = monotonic
        self._open_until_s = dict.fromkeys(self._strategies, 0.0)

    def candidates(self, requested: str | None) -> Iterator[tuple[Strategy, Why]]:
        """Yield strategies from the requested one (None: the best) on, each with the reason why it is its turn.

        Taking the next one means that the last one failed. Open breakers are skipped, except the last.
        """
        start = FALLBACK_ORDER.index(requested) if requested else 0
        names = [name for name in self._strategies if FALLBACK_ORDER.index(name) >= start]
        why = self._first_reason(requested)
        for name in names:
            if name == names[-1] or self._monotonic() >= self._open_until_s[name]:
                yield self._strategies[name], why
                why = "failed"
            elif why != "failed":
                why = "cooling"

    def record_failure(self, strategy: Strategy) -> None:
        self._open_until_s[strategy.name] = self._monotonic() + COOLDOWN_S

    def record_success(self, strategy: Strategy) -> None:
        self._open_until_s[strategy.name] = 0.0

    def _first_reason(self, requested: str | None) -> Why:
        if requested is None:
            return "best"
        return "requested" if requested in self._strategies else "missing"
