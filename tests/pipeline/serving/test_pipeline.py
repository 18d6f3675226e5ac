"""The pipeline as a library: slates from plain histories, by the best strategy that can answer."""

from pathlib import Path

import pytest

from pipeline.artifact import load
from pipeline.backends.torch import TorchEncoder
from pipeline.data.log_io import read_log_by_time
from pipeline.errors import ArtifactError, DeviceError
from pipeline.records import DAY_MS, Event
from pipeline.serving.pipeline import Pipeline, Recommendation
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.strategies import strategies_of
from tests.artifacts import renumbered

OPTIONS = PipelineOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def histories(shop) -> list[list[Event]]:
    """Histories of ten users of the shop."""
    users: dict[str, list[Event]] = {}
    for event in read_log_by_time(shop.log):
        assert isinstance(event, Event)
        users.setdefault(event.user_id, []).append(event)
    return list(users.values())[:10]


@pytest.fixture
def pipeline(shop) -> Pipeline:
    return Pipeline.load(shop.artifact, OPTIONS)


def item_ids(recommendation: Recommendation) -> list[str]:
    return [item.item_id for item in recommendation.items]


def test_model_recommends_untouched_items_with_head_probabilities(pipeline, histories):
    slates = pipeline.recommend(histories, k=7)
    for history, slate in zip(histories, slates, strict=True):
        assert (slate.strategy, slate.backend, slate.why) == ("hstu", "torch", "best")
        assert len(set(item_ids(slate))) == 7
        assert not set(item_ids(slate)) & {event.item_id for event in history}
        scores = [item.score for item in slate.items]
        assert scores == sorted(scores, reverse=True)
        for item in slate.items:
            probabilities = item.engagement, item.retention, item.monetization
            assert all(each is not None and 0 < each < 1 for each in probabilities)


def test_slate_depends_on_its_history_alone_and_not_on_the_events_order(pipeline, histories):
    together = pipeline.recommend(histories, k=5)
    alone = [pipeline.recommend([history], k=5)[0] for history in histories]
    backwards = pipeline.recommend([sorted(history, key=lambda event: -event.ts_ms) for history in histories], k=5)
    for history, first, second, third in zip(histories, together, alone, backwards, strict=True):
        assert item_ids(first) == item_ids(second)
        has_ties = len({event.ts_ms for event in history}) < len(history)
        assert has_ties or item_ids(first) == item_ids(third)
    assert len({tuple(item_ids(slate)) for slate in together}) > 5


def test_failing_model_is_reported_once_and_the_counters_answer(shop, histories, monkeypatch):
    failures: list[tuple[str, str]] = []
    pipeline = Pipeline.load(
        shop.artifact, OPTIONS, lambda failed: failures.append((failed.strategy, str(failed.error)))
    )

    def fail(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(TorchEncoder, "encode", fail)
    slates = pipeline.recommend(histories, k=5)
    assert {(slate.strategy, slate.backend, slate.why) for slate in slates} == {("simple", "numpy", "failed")}
    assert all(len(slate.items) == 5 for slate in slates)
    assert {slate.why for slate in pipeline.recommend(histories, k=5)} == {"cooling"}
    assert failures == [("hstu", "CUDA error: out of memory")], "the failed strategy is skipped during its cooldown"


def test_swapped_model_with_another_item_order_ranks_the_same(shop, pipeline, histories):
    pipeline.vocabulary.admit(["brand-new"])
    before = pipeline.recommend(histories, k=5)
    tokens = list(pipeline.vocabulary.item_ids)
    replaced = pipeline.swap(strategies_of(pipeline.context(renumbered(load(shop.artifact)))), "renumbered")
    replaced.close()
    after = pipeline.recommend(histories, k=5)
    assert pipeline.version == "renumbered"
    assert pipeline.vocabulary.item_ids == tokens, "tokens keep their meaning while the process lives"
    for old, new in zip(before, after, strict=True):
        assert item_ids(old) == item_ids(new)
        engagement = [item.engagement for item in old.items]
        assert engagement == pytest.approx([item.engagement for item in new.items], abs=1e-4)


def test_swapped_model_ranks_at_once_even_if_the_old_one_had_failed(shop, pipeline, histories, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(TorchEncoder, "encode", lambda *_: 1 / 0)
        assert pipeline.recommend(histories, k=5)[0].strategy == "simple"
    assert pipeline.recommend(histories, k=5)[0].strategy == "simple"
    pipeline.swap(strategies_of(pipeline.context(load(shop.artifact))), "again")
    assert pipeline.recommend(histories, k=5)[0].strategy == "hstu"
    assert pipeline.recommend(histories, k=5, strategy="simple")[0].strategy == "simple"


def test_requested_strategy_answers(pipeline, histories):
    slates = pipeline.recommend(histories, k=5, strategy="simple")
    assert {(slate.strategy, slate.backend, slate.why) for slate in slates} == {("simple", "numpy", "requested")}
    assert {item.source for slate in slates for item in slate.items} <= {"cooccurrence", "popular"}


@pytest.mark.parametrize("strategy", ["hstu", "simple"])
def test_user_without_events_gets_popular_items(pipeline, histories, strategy: str):
    with_events, without_events = pipeline.recommend([histories[0], []], k=5, strategy=strategy)
    popular, _ = pipeline.counters.popular(5)
    assert item_ids(without_events) == [pipeline.vocabulary.item_ids[token] for token in popular]
    assert {item.source for item in without_events.items} == {"popular"}
    assert len(with_events.items) == 5


@pytest.mark.parametrize("strategy", ["hstu", "simple"])
def test_item_that_came_after_training_may_be_in_a_history(pipeline, histories, strategy: str):
    last = histories[0][-1]
    newer = [*histories[0], Event(last.user_id, "brand-new", "view", last.ts_ms + DAY_MS)]
    [slate] = pipeline.recommend([newer], k=5, strategy=strategy)
    assert len(slate.items) == 5
    assert slate.strategy == strategy


def test_catalogue_smaller_than_the_slate_is_returned_entirely(pipeline, histories):
    catalogue = {item_id for item_id in pipeline.vocabulary.item_ids if item_id}
    [slate] = pipeline.recommend([histories[0]], k=10_000, strategy="hstu")
    assert set(item_ids(slate)) == catalogue - {event.item_id for event in histories[0]}


def test_pipeline_without_an_artifact_answers_with_the_simple_strategy():
    pipeline = Pipeline.load(None, OPTIONS)
    assert pipeline.recommend([[]], k=3)[0].items == []
    [slate] = pipeline.recommend([[Event("u", "i1", "view", 5)]], k=3)
    assert (slate.strategy, slate.why) == ("simple", "best")
    assert slate.items == []
    [slate] = pipeline.recommend([[]], k=3, strategy="hstu")
    assert (slate.strategy, slate.why) == ("simple", "missing")


@pytest.mark.parametrize("device", ["quantum", "cuda:999"])
def test_missing_device_is_one_sentence(shop, device: str):
    with pytest.raises(DeviceError, match=rf"^pipeline\.device '{device}': [^\n]+; want auto, cpu, cuda or cuda:N$"):
        Pipeline.load(shop.artifact, PipelineOptions(device=device))


def test_invalid_requests_are_rejected(pipeline, histories):
    with pytest.raises(ValueError, match="k = 0, want a whole number from 1"):
        pipeline.recommend(histories, k=0)
    with pytest.raises(ValueError, match="no strategy 'best', want one of unified"):
        pipeline.recommend(histories, strategy="best")
    with pytest.raises(ValueError, match="unknown actions"):
        pipeline.recommend([[Event("u", "i", "dance", 5)]])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Pipeline.load(Path("nowhere"), OPTIONS)
