"""Strategies of one's own, named in the options: they rank before the others, alone and through a model swap."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.errors import StrategyError
from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.strategies import StrategyContext, strategies_of
from pipeline.strategies.strategy import RankedItems, Request

HERE = "tests.pipeline.strategies.test_own_strategies"
OPTIONS = PipelineOptions(device="cpu", threads=1, strategies=(f"{HERE}:Alphabetical",))
HISTORY = [Event("u", "item-3", "view", 1000), Event("u", "item-5", "view", 61_000)]


class Alphabetical:
    """Recommends items by name."""

    name = "alphabetical"
    backend = "python"

    def __init__(self, context: StrategyContext) -> None:
        self.vocabulary = context.catalogue.vocabulary
        self.exclusion = context.options.exclusion
        self.version = context.artifact.version if context.artifact else "none"
        self.is_closed = False

    def prepare(self, request: Request) -> Request:
        return request

    def launch(self, prepared: Request) -> Request:
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        histories = pending.histories
        mask = self.exclusion.mask(histories)
        excluded = self.vocabulary.tokens(histories.items[mask])
        users = histories.users[mask]
        tokens = np.zeros((len(histories), pending.k), np.int32)
        blocked = self.vocabulary.blocked
        every = sorted((item, token) for token, item in enumerate(self.vocabulary.item_ids) if not blocked[token])
        for user in range(len(histories)):
            own = set(excluded[users == user].tolist())
            slate = [token for _, token in every if token not in own][: pending.k]
            tokens[user, : len(slate)] = slate
        scores = np.tile(-np.arange(pending.k, dtype=np.float32), (len(histories), 1))
        return RankedItems(tokens, scores, None, "alphabetical")

    def close(self) -> None:
        self.is_closed = True


class Careless(Alphabetical):
    """Recommends what the user has just seen."""

    name = "careless"

    def finish(self, pending: Request) -> RankedItems:
        ranked = super().finish(pending)
        ranked.tokens[:] = self.vocabulary.tokens(pending.histories.items[:1])[:1]
        return ranked


class Namesake(Alphabetical):
    name = "hstu"


class Renamed(Alphabetical):
    name = "renamed"

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context)
        self.name = "simple"


class Exits(Alphabetical):
    name = "exits"

    def __init__(self, context: StrategyContext) -> None:
        raise SystemExit(0)


class Unready(Alphabetical):
    name = "unready"

    def __init__(self, context: StrategyContext) -> None:
        raise OSError("no such table")


def test_own_strategy_ranks_first_and_the_model_on_request(shop) -> None:
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    assert pipeline.strategies.order[0] == "alphabetical"
    own, by_model, by_counters = (
        pipeline.recommend([HISTORY], 5, strategy)[0] for strategy in (None, "hstu", "simple")
    )
    assert (own.strategy, own.backend, own.why) == ("alphabetical", "python", "best")
    assert [item.item_id for item in own.items] == sorted(item.item_id for item in own.items)
    assert (by_model.strategy, by_counters.strategy) == ("hstu", "simple")


def test_own_strategy_needs_no_model() -> None:
    pipeline = Pipeline.load(None, OPTIONS)
    pipeline.admit(["b", "a"])
    (slate,) = pipeline.recommend([[]], 3)
    assert [item.item_id for item in slate.items] == ["a", "b"]


def test_model_swap_makes_all_strategies_anew_and_closes_the_old_ones(shop) -> None:
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    before = list(pipeline.strategies)
    replaced = pipeline.swap(strategies_of(pipeline.context(artifacts.load(shop.artifact))), "next")
    replaced.close()
    after = list(pipeline.strategies)
    assert [each.name for each in before] == [each.name for each in after] == ["alphabetical", "hstu", "simple"]
    assert not {id(each) for each in before} & {id(each) for each in after}
    assert [each.is_closed for each in (*before, *after) if isinstance(each, Alphabetical)] == [True, False]
    assert pipeline.recommend([HISTORY], 5)[0].strategy == "alphabetical"


@pytest.mark.parametrize(
    ("column", "value"),
    [("source", np.array([["x"]])), ("rank_ms", None), ("tokens", np.full((1, 5), 9999, np.int32))],
    ids=["source", "time", "token"],
)
def test_answer_that_is_none_is_left_to_the_next_strategy(
    shop, monkeypatch: pytest.MonkeyPatch, column: str, value: Any
) -> None:
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    finish = Alphabetical.finish

    def finish_badly(own: Alphabetical, pending: Request) -> RankedItems:
        ranked = finish(own, pending)
        setattr(ranked, column, value)
        return ranked

    monkeypatch.setattr(Alphabetical, "finish", finish_badly)
    (slate,) = pipeline.recommend([HISTORY], 5)
    assert (slate.strategy, slate.why, len(slate.items)) == ("hstu", "failed", 5)
    assert pipeline.recommend([HISTORY], 5)[0].why == "cooling"


def test_strategies_are_closed_when_one_of_them_cannot_serve(shop, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(Alphabetical, "close", lambda own: closed.append(own.name))
    with pytest.raises(StrategyError):
        Pipeline.load(shop.artifact, replace(OPTIONS, strategies=(*OPTIONS.strategies, f"{HERE}:Careless")))
    assert closed == ["alphabetical", "careless"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no-colon", "want 'package.module:Class'"),
        ("no.such.module:Class", "No module named"),
        (f"{HERE}:Missing", "want a class with a `name`, a string, in tests.pipeline"),
        (f"{HERE}:HERE", "want a class with a `name`"),
        (f"{HERE}:Namesake", "another strategy has its name, 'hstu'"),
        (f"{HERE}:Unready", "OSError: no such table when it was made, as Class(context)"),
        (f"{HERE}:Renamed", "its name changed to 'simple' when it was made"),
        (f"{HERE}:Exits", "SystemExit: 0 when it was made"),
        (f"{HERE}:Careless", "it recommends an item twice in one slate"),
    ],
)
def test_strategy_that_cannot_serve_is_one_sentence_at_the_start(path: str, reason: str, shop) -> None:
    with pytest.raises(StrategyError, match=r"^pipeline\.strategies.*") as error:
        Pipeline.load(shop.artifact, replace(OPTIONS, strategies=(path,)))
    assert reason in str(error.value)


def test_one_strategy_twice_is_refused(shop) -> None:
    with pytest.raises(StrategyError, match="another strategy has its name, 'alphabetical'"):
        Pipeline.load(shop.artifact, replace(OPTIONS, strategies=OPTIONS.strategies * 2))


def test_module_that_raises_when_imported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_at_import.py").write_text("raise RuntimeError('half installed')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StrategyError, match="half installed"):
        Pipeline.load(None, replace(OPTIONS, strategies=("raises_at_import:Class",)))
