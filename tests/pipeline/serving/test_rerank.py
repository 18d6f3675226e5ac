import numpy as np
import pytest

from pipeline import artifact as artifacts
from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline, PipelineOptions
from pipeline.serving.rerank import RerankWeights, blend_scores, log_item_values

OPTIONS = PipelineOptions(device="cpu", threads=1)
NOTHING = np.zeros((1, 3), np.float32)


def order(weights: RerankWeights, odds: list[list[float]], values: list[float] | None = None) -> list[int]:
    """Of three candidates whose retrieval scores fall by 0.5."""
    scores, log_values = np.array([[1.0, 0.5, 0.0]]), log_item_values(np.array(values or [0.0, 0.0, 0.0]))
    return np.argsort(-blend_scores(scores, np.array([odds]), log_values[None], weights))[0].tolist()


@pytest.mark.parametrize("task", ["engagement", "retention", "monetization"])
def test_a_weight_draws_the_items_of_its_head_forward(task: str) -> None:
    odds = np.full((3, 3), 0.5)
    odds[2, ["engagement", "retention", "monetization"].index(task)] = 0.99
    assert order(RerankWeights(), odds.tolist()) == [0, 1, 2]
    assert order(RerankWeights(**{task: 1.0}), odds.tolist()) == [0, 2, 1]
    assert order(RerankWeights(**{task: 3.0}), odds.tolist()) == [2, 0, 1]


def test_full_weights_order_by_the_expected_money() -> None:
    odds, values = [[0.5, 0.5, 0.1], [0.5, 0.5, 0.3], [0.5, 0.5, 0.2]], [8.0, 1.0, 20.0]
    expected = np.exp([1.0, 0.5, 0.0]) * np.array([0.1, 0.3, 0.2]) * values
    assert order(RerankWeights(monetization=1.0, value=1.0), odds, values) == np.argsort(-expected).tolist()


def test_an_item_of_unknown_value_counts_as_a_usual_one_and_no_item_stays_last() -> None:
    np.testing.assert_allclose(np.exp(log_item_values(np.array([1.0, 0.0, 4.0, 2.0]))), [1, 2, 4, 2], rtol=1e-6)
    np.testing.assert_array_equal(log_item_values(np.zeros(3)), np.zeros(3))
    missing = blend_scores(np.array([[-np.inf]]), np.zeros((1, 1, 3)), np.zeros((1, 1)), RerankWeights(engagement=1.0))
    assert missing[0, 0] == -np.inf


@pytest.fixture(scope="module")
def histories() -> list[list[Event]]:
    return [[Event(f"u{user}", f"item-{user + step}", "view", 60_000 * step) for step in range(3)] for user in range(5)]


def items(pipeline: Pipeline, histories: list[list[Event]], k: int) -> list[list[str]]:
    return [[item.item_id for item in slate.items] for slate in pipeline.recommend(histories, k)]


def test_weights_of_nothing_leave_every_slate_as_it_was(shop, histories) -> None:
    plain = Pipeline.load(shop.artifact, OPTIONS).recommend(histories, 10)
    off = PipelineOptions(device="cpu", threads=1, rerank=RerankWeights(candidates=40))
    assert Pipeline.load(shop.artifact, off).recommend(histories, 10) == plain


def test_reranked_slates_come_from_the_candidates_and_promise_more_of_what_is_wanted(shop, histories) -> None:
    wanted = PipelineOptions(device="cpu", threads=1, rerank=RerankWeights(monetization=30.0, candidates=40))
    plain, reranked = Pipeline.load(shop.artifact, OPTIONS), Pipeline.load(shop.artifact, wanted)
    candidates = items(plain, histories, 40)
    for before, after, pool in zip(plain.recommend(histories, 10), reranked.recommend(histories, 10), candidates,
                                   strict=True):  # fmt: skip
        odds = [[item.monetization or 0 for item in slate.items] for slate in (before, after)]
        assert sum(odds[1]) > sum(odds[0])
        assert len({item.item_id for item in after.items} & set(pool)) == 10
        scores = [item.score for item in after.items]
        assert scores == sorted(scores, reverse=True)


def test_a_shorter_slate_is_the_beginning_of_a_longer_one(shop, histories) -> None:
    pipeline = Pipeline.load(
        shop.artifact, PipelineOptions(device="cpu", threads=1, rerank=RerankWeights(engagement=1.0))
    )
    assert items(pipeline, histories, 5) == [slate[:5] for slate in items(pipeline, histories, 20)]


def test_a_user_without_events_gets_the_popular_items_in_their_order_all_the_same(shop, histories) -> None:
    wanted = PipelineOptions(device="cpu", threads=1, rerank=RerankWeights(engagement=5.0))
    assert (
        items(Pipeline.load(shop.artifact, wanted), [[], *histories], 8)[0]
        == items(Pipeline.load(shop.artifact, OPTIONS), [[]], 8)[0]
    )


def test_the_artifact_knows_what_items_bring(shop) -> None:
    counters = artifacts.load(shop.artifact).counters
    assert counters["values"].shape == counters["items"].shape
    assert (counters["values"] > 0).mean() > 0.3
