"""Strategies and their fallback chain: every batch gets an answer.

A strategy that raises for several users is skipped for a while, then probed with one batch; meanwhile the next strategy
answers. A single user for whom it raises is set aside, to the next strategy.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from pipeline.records import Histories
from pipeline.slates import Why

FALLBACK_ORDER = ("unified", "tensorrt", "vllm", "hstu", "simple")  # best first
COOLDOWN_S = 30.0  # from a strategy's failure to its next probe


@dataclass(frozen=True, slots=True)
class Request:
    """A batch to rank: the k best items for each user. deadline_s: on time.monotonic's clock, when slates are due"""

    histories: Histories
    k: int
    deadline_s: float = math.inf


@dataclass(slots=True)
class RankedItems:
    """A strategy's answer to a packed batch of n users, padded with token 0 where no items are left.

    tokens: int32 [n, k]; scores: float32 [n, k]
    heads: float32 [n, k, 3], probabilities of engagement, retention and monetization; None: the strategy has no model
    source: object array of str [n, k], or one name for all
    values: float32 [n, k], each item's usual value, 0 = unknown; None: the strategy does not know values
    encode_ms, rank_ms: of the device that does the work; features_ms: of the host
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
    """One way to rank a batch, in three steps, so that batches can overlap: one is prepared while another is computed.

    One thread makes all calls; other batches' steps may come between two of a batch's. A step may raise anything: then
    parts of the batch are tried again, from `prepare` on, and the next strategy ranks the users for whom it raises.
    `pipeline/strategies/conformance.py` checks what is promised here.

    name: on slates and in requests; backend: the runtime it ranks with, such as `torch`, `kernels` or `numpy`, fixed
    once it is loaded
    """

    name: str
    backend: str

    def prepare(self, request: Request) -> Any:
        """Compute on the host what the batch needs, as of the catalogue's state now."""
        ...

    def launch(self, prepared: Any) -> Any:
        """Start the work on what `prepare` returned, without waiting for the device."""
        ...

    def finish(self, pending: Any) -> RankedItems:
        """Wait for what `launch` returned and return the answer."""
        ...

    def close(self) -> None:
        """Free what the strategy holds. No other call may follow, but `close` again."""
        ...


def rank(strategy: Strategy, histories: Histories, k: int) -> RankedItems:
    """Rank one batch from start to end."""
    return strategy.finish(strategy.launch(strategy.prepare(Request(histories, k))))


def close_all(strategies: Iterable[Strategy]) -> list[Exception]:
    """Close every strategy, also after one that raises; return the errors."""
    errors: list[Exception] = []
    for strategy in strategies:
        try:
            strategy.close()
        except Exception as error:  # of a strategy of one's own: the others must be closed, too
            errors.append(error)
    return errors


class FallbackChain:
    """The strategies of this process, best first, each behind a circuit breaker."""

    def __init__(self, strategies: Sequence[Strategy], monotonic: Callable[[], float]) -> None:
        """Order them: those whose names are not in FALLBACK_ORDER first, as they come."""
        names = [strategy.name for strategy in strategies]
        assert len(set(names)) == len(names), "own_names has checked them"
        self.order = (*(name for name in names if name not in FALLBACK_ORDER), *FALLBACK_ORDER)
        by_name = dict(zip(names, strategies, strict=True))
        self._strategies = {name: by_name[name] for name in self.order if name in by_name}
        self._monotonic = monotonic
        self._open_until_s = dict.fromkeys(self._strategies, 0.0)

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self._strategies.values())

    def candidates(self, requested: str | None, deadline_s: float = math.inf) -> Iterator[tuple[Strategy, Why]]:
        """Yield strategies from the requested one (None: the best) on, each with the reason why it is its turn.

        Taking the next one means that the last one failed. Open breakers are skipped, except the last; after a failure
        past the deadline the last strategy, which is the fastest, is the next.
        """
        start = self.order.index(requested) if requested else 0
        names = [name for name in self._strategies if self.order.index(name) >= start]
        why = self._first_reason(requested)
        for name in names:
            is_late = why == "failed" and self.is_late(deadline_s)
            if name == names[-1] or not (is_late or self._monotonic() < self._open_until_s[name]):
                yield self._strategies[name], why
                why = "failed"
            elif why != "failed":
                why = "cooling"

    def check(self, requested: str) -> None:
        """Raise ValueError for the name of a strategy that neither this process nor any other has."""
        if requested not in self.order:
            raise ValueError(f"no strategy '{requested}', want one of {', '.join(self.order)}")

    def is_late(self, deadline_s: float) -> bool:
        return self._monotonic() >= deadline_s

    def record_failure(self, strategy: Strategy) -> None:
        self._open_until_s[strategy.name] = self._monotonic() + COOLDOWN_S

    def record_success(self, strategy: Strategy) -> None:
        self._open_until_s[strategy.name] = 0.0

    def _first_reason(self, requested: str | None) -> Why:
        if requested is None:
            return "best"
        return "requested" if requested in self._strategies else "missing"
