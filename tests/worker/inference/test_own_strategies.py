"""All strategies are swapped together, or none: those of one's own must keep their promises, too."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from pipeline.artifact import Artifact
from pipeline.errors import DeviceError
from pipeline.strategies import hstu_strategy
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategies import StrategyContext
from pipeline.strategies.strategy import RankedItems, Request
from tests import artifacts as relatives
from tests.worker.inference.conftest import Logged, Serving
from worker.interfaces import Batch

OWN = "tests.worker.inference.test_own_strategies:Newest"


class Newest:
    """A strategy of one's own: popular items. It breaks its promises for the artifacts in `broken_for`."""

    name = "newest"
    backend = "numpy"
    broken_for: ClassVar[set[str]] = set()
    failing_to_close: ClassVar[set[str]] = set()
    made: ClassVar[list["Newest"]] = []

    def __init__(self, context: StrategyContext) -> None:
        self._inner = SimpleStrategy(context.counters, context.options.exclusion)
        self.version = context.artifact.version if context.artifact else "none"
        self.is_closed = False
        self.made.append(self)

    def prepare(self, request: Request) -> Any:
        return self._inner.prepare(request)

    def launch(self, prepared: Any) -> Any:
        return self._inner.launch(prepared)

    def finish(self, pending: Any) -> RankedItems:
        ranked = self._inner.finish(pending)
        return ranked.first(1) if self.version in self.broken_for else ranked

    def close(self) -> None:
        self.is_closed = True
        if self.version in self.failing_to_close:
            raise RuntimeError("still in use")


@pytest.fixture
def own(serve: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> Serving:
    """Serving with a strategy of one's own."""
    monkeypatch.setattr(Newest, "made", [])
    monkeypatch.setattr(Newest, "broken_for", set())
    monkeypatch.setattr(Newest, "failing_to_close", set())
    return serve(strategies=(OWN,))


def made() -> list[tuple[str, bool]]:
    """Return the version of each strategy of one's own, and whether it is closed."""
    return [(each.version, each.is_closed) for each in Newest.made]


async def test_all_strategies_are_swapped_together(own: Serving, original: Artifact, batch: Batch) -> None:
    first = own.version
    version = own.publish("second", relatives.nudged(original, seed=1))
    assert await own.check() == version
    assert made() == [(first, True), (version, False)]
    for strategy in ("newest", "hstu", "simple"):
        slates = await own.ranker.rank(Batch(batch.entries, 512, strategy))
        assert {(slate.strategy, slate.model_version) for slate in slates} == {(strategy, version)}


async def test_strategy_that_does_not_close_is_logged_and_the_swap_is_complete(
    own: Serving, original: Artifact, logged: Logged
) -> None:
    Newest.failing_to_close.add(own.version)
    version = own.publish("second", relatives.nudged(original, seed=1))
    assert await own.check() == version
    events = {entry["event"]: entry for entry in logged()}
    assert "still in use" in events["a replaced strategy did not close"]["error"]
    assert events["model swapped"]["version"] == version
    assert "artifact rejected, serving model continues" not in events


async def test_own_strategy_is_closed_when_the_model_beside_it_cannot_be_made(
    own: Serving, original: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own.version
    version = own.publish("second", relatives.nudged(original, seed=1))

    def fail(*_: Any, **__: Any) -> None:
        raise DeviceError("no memory is left")

    monkeypatch.setattr(hstu_strategy, "load_hstu_strategy", fail)
    assert await own.check() == first
    assert made() == [(first, False), (version, True)]


async def test_own_strategy_that_breaks_a_promise_rejects_the_swap_of_all(
    own: Serving, original: Artifact, batch: Batch, logged: Logged
) -> None:
    first = own.version
    version = own.publish("second", relatives.nudged(original, seed=1))
    Newest.broken_for.add(version)
    assert await own.check() == first
    assert made() == [(first, False), (version, True)]
    (entry,) = [entry for entry in logged() if entry["event"] == "artifact rejected, serving model continues"]
    assert "Newest: its tokens have the shape" in entry["reason"]
    slates = await own.ranker.rank(batch)
    assert {(slate.strategy, slate.model_version) for slate in slates} == {("newest", first)}
