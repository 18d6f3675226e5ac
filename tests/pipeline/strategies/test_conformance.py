"""The checks that every strategy must pass: this project's strategies do, and each broken promise is found."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import StrategyError
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories
from pipeline.strategies.conformance import check_strategy, violations
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategies import StrategyContext, strategies_of
from pipeline.strategies.strategy import RankedItems, Request, Strategy
from tests.artifacts import untrained

IDS = [f"i{number}" for number in range(90)]
EXCLUSION = Exclusion()


def make_vocabulary() -> Vocabulary:
    """Return a vocabulary whose first item is delisted."""
    vocabulary = Vocabulary(IDS)
    vocabulary.delist(IDS[:1])
    return vocabulary


def make_simple(vocabulary: Vocabulary) -> SimpleStrategy:
    counters = new_counters(PipelineOptions(), vocabulary)
    seen = Histories.from_events([[Event("u", item, "view", n) for n, item in enumerate(IDS)]], EventSchema())
    counters.observe(seen, np.ones(len(seen.events), bool))
    return SimpleStrategy(counters, EXCLUSION)


def test_every_strategy_of_an_artifact_keeps_its_promises() -> None:
    artifact = untrained(IDS)
    catalogue = Catalogue(make_vocabulary())
    artifact.load_into(catalogue)
    options = PipelineOptions(device="cpu", threads=1)
    context = StrategyContext(artifact, catalogue, new_counters(options, catalogue.vocabulary), options)
    strategies = strategies_of(context)
    assert [strategy.name for strategy in strategies] == ["hstu", "simple"]
    for strategy in strategies:
        assert list(violations(strategy, catalogue.vocabulary, options.exclusion)) == []
        strategy.close()
        strategy.close()


def test_strategy_of_a_process_without_items_keeps_its_promises() -> None:
    vocabulary = Vocabulary()
    strategy = SimpleStrategy(new_counters(PipelineOptions(), vocabulary), EXCLUSION)
    assert list(violations(strategy, vocabulary, EXCLUSION)) == []


@dataclass
class Altered:
    """The simple strategy with a name of its own, whose answers `alter` changes."""

    inner: SimpleStrategy
    alter: Callable[[RankedItems], RankedItems]
    name: str = "altered"
    backend: str = "numpy"
    launched: list[Any] = field(default_factory=list)

    def prepare(self, request: Request) -> Any:
        return self.inner.prepare(request)

    def launch(self, prepared: Any) -> Any:
        return self.inner.launch(prepared)

    def finish(self, pending: Any) -> RankedItems:
        return self.alter(pending)

    def close(self) -> None: ...


def swapped(ranked: RankedItems) -> RankedItems:
    """Return the second item before the first."""
    order = [1, 0, *range(2, ranked.tokens.shape[1])][: ranked.tokens.shape[1]]
    return replace(ranked, tokens=ranked.tokens[:, order], scores=ranked.scores[:, order])


def with_column(name: str, make: Callable[[RankedItems], Any]) -> Callable[[RankedItems], RankedItems]:
    return lambda ranked: replace(ranked, **{name: make(ranked)})


def ranks(ranked: RankedItems) -> np.ndarray:
    """Return each slate position's rank from 0, of the slates' shape."""
    return np.broadcast_to(np.arange(ranked.tokens.shape[1], dtype=np.int32), ranked.tokens.shape)


BROKEN: dict[str, Callable[[RankedItems], Any]] = {
    "answers with NoneType": lambda ranked: None,
    "tokens are list": with_column("tokens", lambda ranked: ranked.tokens.tolist()),
    "tokens are int64": with_column("tokens", lambda ranked: ranked.tokens.astype(np.int64)),
    "scores are NoneType": with_column("scores", lambda ranked: None),
    "a value that is below 0": with_column("values", lambda ranked: np.full_like(ranked.scores, np.nan)),
    "source is neither": with_column("source", lambda ranked: np.array([["popular"]])),
    "times are not all numbers": with_column("rank_ms", lambda ranked: None),
    "have the shape": lambda ranked: ranked.first(max(1, ranked.tokens.shape[1] - 1)),
    "heads have the shape": with_column("heads", lambda ranked: np.zeros((*ranked.tokens.shape, 2), np.float32)),
    "not all from 0 to": with_column("tokens", lambda ranked: ranked.tokens + 1000),
    "has a gap": with_column("tokens", lambda ranked: ranked.tokens * (ranks(ranked) > 0)),
    "a delisted item": with_column("tokens", lambda ranked: np.where(ranks(ranked) > 0, ranked.tokens, 1)),
    "not finite": with_column("scores", lambda ranked: np.full_like(ranked.scores, np.nan)),
    "not in the order of its scores": swapped,
    "not from 0 to 1": with_column("heads", lambda ranked: np.full((*ranked.tokens.shape, 3), 1.5, np.float32)),
    "an item twice": with_column("tokens", lambda ranked: ranked.tokens[:, :1] + 0 * ranked.tokens),
    "keep off the slate": with_column("tokens", lambda ranked: 2 + ranks(ranked)),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_broken_promise_of_an_answer_is_found(sentence: str) -> None:
    vocabulary = make_vocabulary()
    strategy = Altered(make_simple(vocabulary), BROKEN[sentence])
    assert sentence in " ".join(violations(strategy, vocabulary, EXCLUSION))
    with pytest.raises(StrategyError, match=r"pipeline\.strategies: Altered: "):
        check_strategy(strategy, vocabulary, EXCLUSION)


def test_unaltered_strategy_under_its_own_name_passes() -> None:
    vocabulary = make_vocabulary()
    check_strategy(Altered(make_simple(vocabulary), lambda ranked: ranked), vocabulary, EXCLUSION)


@pytest.mark.parametrize(("attribute", "value"), [("name", "Has Spaces"), ("backend", ""), ("name", "x" * 40)])
def test_name_that_no_metric_label_should_have_is_found(attribute: str, value: str) -> None:
    vocabulary = make_vocabulary()
    strategy = Altered(make_simple(vocabulary), lambda ranked: ranked)
    setattr(strategy, attribute, value)
    assert f"its {attribute} is {value!r}" in next(violations(strategy, vocabulary, EXCLUSION))


def test_batches_that_share_memory_are_found() -> None:
    vocabulary = make_vocabulary()
    kept: list[RankedItems] = []

    class OneResult(Altered):
        """Keeps the last launch only, as a buffer that is reused too early."""

        def launch(self, prepared: Any) -> Any:
            kept[:] = [self.inner.launch(prepared)]
            return len(prepared.request.histories)

        def finish(self, pending: int) -> RankedItems:
            (ranked,) = kept
            rows = np.arange(pending) % len(ranked.tokens)
            return RankedItems(ranked.tokens[rows], ranked.scores[rows], None, "popular")

    strategy = OneResult(make_simple(vocabulary), lambda ranked: ranked)
    assert "when the next one is launched before it is finished" in " ".join(
        violations(strategy, vocabulary, EXCLUSION)
    )


def test_strategy_that_keeps_its_latest_preparation_only_is_found() -> None:
    vocabulary = make_vocabulary()
    kept: list[Any] = []

    class OnePreparation(Altered):
        def prepare(self, request: Request) -> None:
            kept[:] = [self.inner.prepare(request)]

        def launch(self, prepared: None) -> Any:
            return self.inner.launch(kept[0])

    strategy = OnePreparation(make_simple(vocabulary), lambda ranked: ranked)
    assert "before it is finished" in " ".join(violations(strategy, vocabulary, EXCLUSION))


def test_strategy_that_refuses_a_second_launch_is_found() -> None:
    vocabulary = make_vocabulary()

    class OneAtATime(Altered):
        def launch(self, prepared: Any) -> Any:
            if self.launched:
                raise RuntimeError("busy")
            self.launched.append(prepared)
            return self.inner.launch(prepared)

        def finish(self, pending: Any) -> RankedItems:
            self.launched.clear()
            return pending

    strategy = OneAtATime(make_simple(vocabulary), lambda ranked: ranked)
    (sentence,) = violations(strategy, vocabulary, EXCLUSION)
    assert sentence.startswith("it raised RuntimeError('busy') when the next batch was prepared or launched")


def test_slate_of_one_user_for_all_is_found() -> None:
    vocabulary = make_vocabulary()
    strategy = Altered(
        make_simple(vocabulary), with_column("tokens", lambda ranked: ranked.tokens[-1:] + 0 * ranked.tokens)
    )
    assert "keep off the slate" in " ".join(violations(strategy, vocabulary, EXCLUSION))


def test_strategy_that_fails_for_many_users_is_found() -> None:
    vocabulary = make_vocabulary()

    def fail_for_many(ranked: RankedItems) -> RankedItems:
        assert len(ranked.tokens) < 20, "too many"
        return ranked

    strategy = Altered(make_simple(vocabulary), fail_for_many)
    assert "too many" in " ".join(violations(strategy, vocabulary, EXCLUSION))


def test_strategy_that_raises_or_lacks_a_step_is_found() -> None:
    vocabulary = make_vocabulary()

    def fail(ranked: RankedItems) -> RankedItems:
        raise RuntimeError("no connection")

    (raised,) = violations(Altered(make_simple(vocabulary), fail), vocabulary, EXCLUSION)
    assert raised == "it raised RuntimeError('no connection') for 1 users of [1] events, k = 10"

    class Ranks:
        name = "ranks"
        backend = "numpy"

    without_steps: Any = Ranks()
    strategy: Strategy = without_steps
    assert list(violations(strategy, vocabulary, EXCLUSION)) == ["it has no method prepare, launch, finish, close"]
