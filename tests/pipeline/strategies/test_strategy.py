"""The fallback chain: the best healthy strategy answers, a failed one is skipped and then probed."""

from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.strategies.strategy import COOLDOWN_S, FallbackChain, RankedItems, Request


@dataclass
class FakeStrategy:
    name: str
    backend: str = "fake"

    def prepare(self, request: Request) -> Request:
        return request

    def launch(self, prepared: Request) -> Request:
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        return RankedItems(np.zeros((0, pending.k), np.int32), np.zeros((0, pending.k), np.float32), None, self.name)

    def close(self) -> None: ...


@dataclass
class ManualClock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


STRATEGIES = {name: FakeStrategy(name) for name in ("simple", "hstu", "tensorrt")}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def chain(clock: ManualClock) -> FallbackChain:
    return FallbackChain([*STRATEGIES.values()], clock)


def names(chain: FallbackChain, requested: str | None = None) -> list[str]:
    return [strategy.name for strategy, _ in chain.candidates(requested)]


def reasons(chain: FallbackChain, requested: str | None = None) -> dict[str, str]:
    """Return why each strategy would be taken if all those before it failed."""
    return {strategy.name: why for strategy, why in chain.candidates(requested)}


def test_candidates_come_best_first_from_the_requested_one_on(chain: FallbackChain):
    assert names(chain) == ["tensorrt", "hstu", "simple"]
    assert names(chain, "vllm") == ["hstu", "simple"]
    assert names(chain, "simple") == ["simple"]


def test_failed_strategy_is_skipped_until_its_cooldown_is_over(chain: FallbackChain, clock: ManualClock):
    chain.record_failure(STRATEGIES["tensorrt"])
    assert names(chain) == ["hstu", "simple"]
    clock.now_s = COOLDOWN_S
    assert names(chain) == ["tensorrt", "hstu", "simple"]


def test_first_candidate_is_the_best_the_requested_or_the_next_after_a_missing_one(chain: FallbackChain):
    assert reasons(chain)["tensorrt"] == "best"
    assert reasons(chain, "tensorrt")["tensorrt"] == "requested"
    assert reasons(chain, "unified")["tensorrt"] == "missing"


@pytest.mark.parametrize("requested", [None, "tensorrt", "unified"])
def test_candidates_after_one_that_raised_are_taken_because_it_failed(chain: FallbackChain, requested: str | None):
    taken = reasons(chain, requested)
    assert (taken["hstu"], taken["simple"]) == ("failed", "failed")


@pytest.mark.parametrize("requested", [None, "tensorrt", "unified"])
def test_skipped_strategy_is_the_reason_until_another_one_raises(
    chain: FallbackChain, clock: ManualClock, requested: str | None
):
    chain.record_failure(STRATEGIES["tensorrt"])
    assert reasons(chain, requested) == {"hstu": "cooling", "simple": "failed"}
    assert reasons(chain, "hstu")["hstu"] == "requested", "the skipped one was not requested"
    clock.now_s = COOLDOWN_S
    assert reasons(chain)["tensorrt"] == "best"


def test_raising_strategy_outweighs_a_skipped_one(chain: FallbackChain):
    chain.record_failure(STRATEGIES["hstu"])
    assert reasons(chain) == {"tensorrt": "best", "simple": "failed"}


def test_last_strategy_is_never_skipped(chain: FallbackChain):
    for strategy in STRATEGIES.values():
        chain.record_failure(strategy)
    assert names(chain) == ["simple"]
