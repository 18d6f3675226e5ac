"""A batch's way through the steps of strategies: overlapping batches, failures of every step, swaps meanwhile."""

from dataclasses import dataclass, field
from threading import Thread

import numpy as np
import pytest

from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories
from pipeline.serving.pipeline import Pipeline
from pipeline.serving.ranking import STEPS
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.strategy import RankedItems, Request

ITEMS = ["a", "b", "c"]
HISTORIES = Histories.from_events([[Event("u", "a", "view", 1)]], EventSchema())


@dataclass
class RecordingStrategy:
    """Recommends one item, keeps a list of its calls, and raises in the steps it is told to."""

    name: str
    token: int
    failing: set[str] = field(default_factory=set)
    backend: str = "numpy"
    calls: list[str] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)

    def prepare(self, request: Request) -> Request:
        self.deadlines_s.append(request.deadline_s)
        self._call("prepare")
        return request

    def launch(self, prepared: Request) -> Request:
        self._call("launch")
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        self._call("finish")
        tokens = np.full((len(pending.histories), 1), self.token, np.int32)
        return RankedItems(tokens, np.ones(tokens.shape, np.float32), None, self.name)

    def close(self) -> None:
        self.calls.append("close")

    def _call(self, step: str) -> None:
        self.calls.append(step)
        if step in self.failing:
            raise RuntimeError(f"{self.name} cannot {step}")


@dataclass
class Bench:
    """A pipeline of three recording strategies."""

    best: RecordingStrategy = field(default_factory=lambda: RecordingStrategy("best", 1))
    hstu: RecordingStrategy = field(default_factory=lambda: RecordingStrategy("hstu", 2))
    simple: RecordingStrategy = field(default_factory=lambda: RecordingStrategy("simple", 3))
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = PipelineOptions()
        vocabulary = Vocabulary(ITEMS)
        counters = new_counters(options, vocabulary)
        strategies = [self.simple, self.hstu, self.best]
        self.pipeline = Pipeline(
            options,
            Catalogue(vocabulary),
            counters,
            strategies,
            "v1",
            lambda fallback: self.failures.append(fallback.strategy),
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_steps_of_two_batches_may_alternate(bench: Bench) -> None:
    pipeline = bench.pipeline
    first = pipeline.launch(pipeline.prepare(Request(HISTORIES, 1)))
    second = pipeline.prepare(Request(HISTORIES, 1), "hstu")
    results = [pipeline.finish(first), pipeline.finish(pipeline.launch(second))]
    assert [(result.origins[0].strategy, result.slates[0][0].item_id) for result in results] == [
        ("best", "a"),
        ("hstu", "b"),
    ]
    assert bench.best.calls == bench.hstu.calls == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_strategy_that_fails_in_any_step_leaves_the_batch_to_the_next_from_its_start(bench: Bench, step: str) -> None:
    bench.best.failing = {step}
    result = bench.pipeline.rank(HISTORIES, 1)
    assert result.origins[0][::2] == ("hstu", "failed")
    assert bench.failures == ["best"]
    assert bench.best.calls == list(STEPS[: STEPS.index(step) + 1])
    assert bench.hstu.calls == list(STEPS)
    assert bench.pipeline.rank(HISTORIES, 1).origins[0].why == "cooling"


def test_last_strategys_error_is_raised(bench: Bench) -> None:
    for strategy in (bench.best, bench.hstu, bench.simple):
        strategy.failing = {"launch"}
    with pytest.raises(RuntimeError, match="simple cannot launch"):
        bench.pipeline.rank(HISTORIES, 1)
    assert bench.failures == ["best", "hstu", "simple"]
    bench.pipeline.swap([RecordingStrategy("simple", 1)], "v2").close()
    assert bench.simple.calls[-1] == "close", "the failed batch is not waited for"


def test_deadline_reaches_the_strategies_and_after_a_late_failure_the_last_one_is_next(bench: Bench) -> None:
    bench.best.failing = {"finish"}
    result = bench.pipeline.rank(HISTORIES, 1, deadline_s=-1.0)
    assert result.origins[0][::2] == ("simple", "failed")
    assert bench.hstu.calls == []
    assert bench.best.deadlines_s == bench.simple.deadlines_s == [-1.0]


def test_late_batch_is_ranked_by_the_best_strategy_while_nothing_fails(bench: Bench) -> None:
    assert bench.pipeline.rank(HISTORIES, 1, deadline_s=-1.0).origins[0].strategy == "best"


def test_batch_in_flight_ends_with_the_strategies_it_began_with(bench: Bench) -> None:
    pipeline = bench.pipeline
    pending = pipeline.launch(pipeline.prepare(Request(HISTORIES, 1)))
    replaced = pipeline.swap([RecordingStrategy("simple", 3)], "v2")
    closing = Thread(target=replaced.close)
    closing.start()
    assert (pipeline.rank(HISTORIES, 1).version, pipeline.version) == ("v2", "v2")
    assert "close" not in bench.best.calls, "its batch has not ended"
    result = pipeline.finish(pending)
    closing.join(timeout=30)
    assert (result.origins[0].strategy, result.version) == ("best", "v1")
    assert bench.best.calls == [*STEPS, "close"]
    assert bench.simple.calls == ["close"]


def test_closing_a_pipeline_closes_its_strategies(bench: Bench) -> None:
    bench.pipeline.close()
    assert [each.calls for each in (bench.best, bench.hstu, bench.simple)] == [["close"]] * 3


def test_strategy_that_no_process_has_is_an_error(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no strategy 'oracle', want one of best, unified, "):
        bench.pipeline.recommend([[]], 1, "oracle")
