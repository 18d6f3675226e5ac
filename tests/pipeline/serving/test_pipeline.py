"""The pipeline as a library: slates from plain histories, by the best rung that can answer."""

from pathlib import Path

import pytest

from pipeline.artifact import load
from pipeline.data.log_io import read_log_by_time
from pipeline.errors import ArtifactError, DeviceError
from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline, PipelineOptions, load_strategy
from tests.artifacts import renumbered

OPTIONS = PipelineOptions(device="cpu", threads=1)
DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def histories(shop) -> list[list[Event]]:
    """Of ten users of the shop."""
    found: dict[str, list[Event]] = {}
    for event in read_log_by_time(shop.log):
        assert isinstance(event, Event)
        found.setdefault(event.user_id, []).append(event)
    return list(found.values())[:10]


def ids(recommendation) -> list[str]:
    return [item.item_id for item in recommendation.items]


def test_a_model_answers_with_items_that_the_user_has_not_touched_and_the_odds_of_each(shop, histories):
    slates = Pipeline.load(shop.artifact, OPTIONS).recommend(histories, k=7)
    for history, slate in zip(histories, slates, strict=True):
        assert slate.strategy == "hstu"
        assert len(set(ids(slate))) == 7
        assert not set(ids(slate)) & {event.item_id for event in history}
        scores = [item.score for item in slate.items]
        assert scores == sorted(scores, reverse=True)
        for item in slate.items:
            odds = item.engagement, item.retention, item.monetization
            assert all(each is not None and 0 < each < 1 for each in odds)


def test_an_answer_depends_on_its_history_alone_and_not_on_the_events_order(shop, histories):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    together = pipeline.recommend(histories, k=5)
    alone = [pipeline.recommend([history], k=5)[0] for history in histories]
    backwards = pipeline.recommend([sorted(history, key=lambda event: -event.ts_ms) for history in histories], k=5)
    distinct = [len({event.ts_ms for event in history}) == len(history) for history in histories]
    for whole, one, turned, strict in zip(together, alone, backwards, distinct, strict=True):
        assert ids(whole) == ids(one)
        assert not strict or ids(whole) == ids(turned)
    assert len({tuple(ids(slate)) for slate in together}) > 5


def test_when_the_model_fails_the_counters_answer_and_the_failure_is_reported(shop, histories, monkeypatch):
    fell: list[tuple[str, str]] = []
    pipeline = Pipeline.load(shop.artifact, OPTIONS, lambda rung, error: fell.append((rung, str(error))))

    def broken(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("pipeline.backends.torch.TorchEncoder.encode", broken)
    slates = pipeline.recommend(histories, k=5)
    assert {slate.strategy for slate in slates} == {"simple"}
    assert all(len(slate.items) == 5 for slate in slates)
    pipeline.recommend(histories, k=5)
    assert fell == [("hstu", "CUDA error: out of memory")], "the failed rung rests: it is not asked again at once"


def test_an_adopted_model_ranks_from_then_on_though_its_items_are_numbered_otherwise(shop, histories):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    pipeline.vocabulary.admit(["brand-new"])
    before, tokens = pipeline.recommend(histories, k=5), list(pipeline.vocabulary.item_ids)
    turned = renumbered(load(shop.artifact))
    pipeline.swap_model(load_strategy(turned, pipeline.catalogue, OPTIONS), "turned")
    after = pipeline.recommend(histories, k=5)
    assert pipeline.version == "turned"
    assert pipeline.vocabulary.item_ids == tokens, "tokens keep their meaning while the process lives"
    for old, new in zip(before, after, strict=True):
        assert ids(old) == ids(new)
        assert [item.engagement for item in old.items] == pytest.approx(
            [item.engagement for item in new.items], abs=1e-4
        )


def test_an_adopted_model_is_asked_at_once_though_the_one_before_it_rests(shop, histories, monkeypatch):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.backends.torch.TorchEncoder.encode", lambda *_: 1 / 0)
        assert pipeline.recommend(histories, k=5)[0].strategy == "simple"
    assert pipeline.recommend(histories, k=5)[0].strategy == "simple"
    pipeline.swap_model(load_strategy(load(shop.artifact), pipeline.catalogue, OPTIONS), "again")
    assert pipeline.recommend(histories, k=5)[0].strategy == "hstu"
    assert pipeline.recommend(histories, k=5, strategy="simple")[0].strategy == "simple"


def test_a_rung_can_be_asked_for(shop, histories):
    slates = Pipeline.load(shop.artifact, OPTIONS).recommend(histories, k=5, strategy="simple")
    assert {slate.strategy for slate in slates} == {"simple"}
    assert {item.source for slate in slates for item in slate.items} <= {"cooccurrence", "popular"}


@pytest.mark.parametrize("strategy", ["hstu", "simple"])
def test_a_user_without_events_gets_what_is_popular(shop, histories, strategy: str):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    known, nobody = pipeline.recommend([histories[0], []], k=5, strategy=strategy)
    assert ids(nobody) == [item.item_id for item in pipeline.popular(5)]
    assert {item.source for item in nobody.items} == {"popular"}
    assert len(known.items) == 5


@pytest.mark.parametrize("strategy", ["hstu", "simple"])
def test_an_item_that_came_after_training_is_part_of_a_history(shop, histories, strategy: str):
    newer = [*histories[0], Event(histories[0][0].user_id, "brand-new", "view", histories[0][-1].ts_ms + DAY_MS)]
    [slate] = Pipeline.load(shop.artifact, OPTIONS).recommend([newer], k=5, strategy=strategy)
    assert len(slate.items) == 5
    assert slate.strategy == strategy


def test_a_catalogue_that_is_smaller_than_the_slate_gives_what_it_has(shop, histories):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    catalogue = {item_id for item_id in pipeline.vocabulary.item_ids if item_id}
    [slate] = pipeline.recommend([histories[0]], k=10_000, strategy="hstu")
    assert set(ids(slate)) == catalogue - {event.item_id for event in histories[0]}


def test_without_an_artifact_the_library_answers_once_it_has_seen_events():
    pipeline = Pipeline.load(None, OPTIONS)
    assert pipeline.recommend([[]], k=3)[0].items == []
    [slate] = pipeline.recommend([[Event("u", "i1", "view", 5)]], k=3)
    assert slate.strategy == "simple"
    assert slate.items == []


@pytest.mark.parametrize("device", ["quantum", "cuda:999"])
def test_a_device_that_is_not_here_is_one_sentence(shop, device: str):
    with pytest.raises(DeviceError, match=rf"^pipeline\.device '{device}': [^\n]+; want auto, cpu, cuda or cuda:N$"):
        Pipeline.load(shop.artifact, PipelineOptions(device=device))


def test_what_cannot_be_asked_for_is_one_sentence(shop, histories):
    pipeline = Pipeline.load(shop.artifact, OPTIONS)
    with pytest.raises(ValueError, match="k = 0, want at least 1"):
        pipeline.recommend(histories, k=0)
    with pytest.raises(ValueError, match="no strategy 'best', want one of unified"):
        pipeline.recommend(histories, strategy="best")
    with pytest.raises(ValueError, match="unknown actions"):
        pipeline.recommend([[Event("u", "i", "dance", 5)]])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Pipeline.load(Path("nowhere"), OPTIONS)
