"""A user for whom a strategy fails is set aside; the others get its answer, and it rests only if they fail, too."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories
from pipeline.serving.batch_result import BatchResult
from pipeline.serving.generation import Fallback
from pipeline.serving.pipeline import Pipeline
from pipeline.serving.ranking import STEPS
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.strategy import RankedItems, Request

ITEMS = [f"i{number}" for number in range(300)]
POISON = "poison"


@dataclass
class Echo:
    """Recommends each user's own item, and raises in one of its steps for users of the poison item, or for all."""

    vocabulary: Vocabulary
    name: str = "hstu"
    backend: str = "numpy"
    step: str = "prepare"
    is_broken: bool = False
    raises_left: int = 1 << 30
    ranked_users: int = 0

    def prepare(self, request: Request) -> Request:
        self.ranked_users += len(request.histories)
        return self._step("prepare", request)

    def launch(self, prepared: Request) -> Request:
        return self._step("launch", prepared)

    def finish(self, pending: Request) -> RankedItems:
        request = self._step("finish", pending)
        tokens = self.vocabulary.tokens(request.histories.items[request.histories.offsets[1:] - 1])[:, None]
        return RankedItems(tokens, np.ones(tokens.shape, np.float32), None, self.name, features_ms=1.0)

    def close(self) -> None: ...

    def _step(self, step: str, request: Request) -> Request:
        poison = self.vocabulary.hashes[self.vocabulary.token(POISON)]
        if step == self.step and self.raises_left and (self.is_broken or (request.histories.items == poison).any()):
            self.raises_left -= 1
            raise RuntimeError(f"cannot {step}")
        return request


@dataclass
class Bench:
    fallbacks: list[Fallback] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary([POISON, *ITEMS])
        self.hstu = Echo(self.vocabulary)
        self.simple = Echo(self.vocabulary, "simple", step="never")
        options = PipelineOptions()
        counters = new_counters(options, self.vocabulary)
        catalogue = Catalogue(self.vocabulary)
        self.pipeline = Pipeline(options, catalogue, counters, [self.hstu, self.simple], "v1", self.fallbacks.append)

    def rank(self, users: int, *poisoned: int, deadline_s: float = np.inf) -> BatchResult:
        items = [POISON if user in poisoned else ITEMS[user] for user in range(users)]
        result = self.pipeline.rank(batch(items), 1, deadline_s=deadline_s)
        assert [[item.item_id for item in slate] for slate in result.slates] == [[item] for item in items]
        return result


def batch(items: list[str]) -> Histories:
    return Histories.from_events(
        [[Event(f"u{user}", item, "view", 1)] for user, item in enumerate(items)], EventSchema()
    )


def strategies(result: BatchResult) -> list[str]:
    return [origin.strategy for origin in result.origins]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@given(users=st.integers(2, 300), data=st.data(), step=st.sampled_from(STEPS))
def test_one_user_that_makes_a_strategy_raise_is_set_aside_and_the_others_are_answered(
    users: int, data: st.DataObject, step: str
) -> None:
    bench = Bench()
    bench.hstu.step = step
    poisoned = data.draw(st.integers(0, users - 1))
    result = bench.rank(users, poisoned)
    assert [user for user, name in enumerate(strategies(result)) if name != "hstu"] == [poisoned]
    assert (result.origins[poisoned].strategy, result.origins[poisoned].why) == ("simple", "failed")
    assert {origin.why for user, origin in enumerate(result.origins) if user != poisoned} == {"best"}
    assert [(each.strategy, each.users, each.is_resting) for each in bench.fallbacks] == [("hstu", 1, False)]
    assert bench.hstu.ranked_users <= 3 * users + 9
    assert sum(len(part.tokens) for part in result.ranked) == users
    assert set(strategies(bench.rank(users))) == {"hstu"}, "it does not rest"


def test_strategy_that_fails_for_all_is_tried_twice_more_and_rests(bench: Bench) -> None:
    bench.hstu.is_broken = True
    assert set(bench.rank(256).origins) == {("simple", "numpy", "failed")}
    assert [(each.users, each.is_resting) for each in bench.fallbacks] == [(256, True)]
    assert bench.hstu.ranked_users == 2 * 256
    assert set(bench.rank(256).origins) == {("simple", "numpy", "cooling")}


def test_two_users_that_fail_make_the_strategy_rest_and_the_others_keep_its_answers(bench: Bench) -> None:
    result = bench.rank(16, 3, 5)
    assert strategies(result) == ["simple"] * 8 + ["hstu"] * 8, "the half that both are in"
    assert bench.fallbacks[0].is_resting
    assert set(bench.rank(2).origins) == {("simple", "numpy", "cooling")}


@pytest.mark.parametrize("deadline_s", [np.inf, -1.0], ids=["in time", "late"])
@pytest.mark.parametrize("users", [1, 4])
def test_batch_without_other_answers_rests_the_strategy_only_if_an_earlier_user_fails_too(
    bench: Bench, users: int, deadline_s: float
) -> None:
    bench.rank(3)
    for _ in range(3):
        poisoned = bench.rank(users, 0, deadline_s=deadline_s)
        assert poisoned.origins[0] == ("simple", "numpy", "failed")
        assert set(strategies(bench.rank(3))) == {"hstu"}
    bench.hstu.is_broken = True
    assert set(strategies(bench.rank(users, deadline_s=deadline_s))) == {"simple"}
    assert {origin.why for origin in bench.rank(3).origins} == {"cooling"}


def test_late_batch_goes_to_the_last_strategy_without_further_attempts(bench: Bench) -> None:
    result = bench.rank(8, 2, deadline_s=-1.0)
    assert set(result.origins) == {("simple", "numpy", "failed")}
    assert bench.hstu.ranked_users == 8


def test_error_that_passes_is_reported_and_all_users_are_answered_by_the_strategy(bench: Bench) -> None:
    bench.hstu.is_broken = True
    bench.hstu.raises_left = 1
    assert set(bench.rank(8).origins) == {("hstu", "numpy", "best")}
    assert [(each.users, each.is_resting) for each in bench.fallbacks] == [(0, False)]


def test_pending_batch_of_a_replaced_generation_is_isolated_by_its_own_strategies(bench: Bench) -> None:
    pipeline = bench.pipeline
    bench.hstu.step = "finish"
    pending = pipeline.launch(pipeline.prepare(Request(batch([POISON, *ITEMS[:4]]), 1)))
    replaced = pipeline.swap([Echo(bench.vocabulary, "simple")], "v2")
    result = pipeline.finish(pending)
    assert strategies(result) == ["simple", *["hstu"] * 4]
    assert (result.version, replaced.pending, replaced.done.is_set()) == ("v1", 0, True)


def test_user_for_whom_every_strategy_fails_ends_the_batch_with_the_last_error(bench: Bench) -> None:
    bench.simple.step = "launch"
    with pytest.raises(RuntimeError, match="cannot launch"):
        bench.pipeline.rank(batch([*ITEMS[:4], POISON]), 1)
    assert not bench.pipeline._serving.pending
