import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.features.labels import TASKS
from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.rerank import RerankWeights, blend_scores, log_item_values, median_value

OPTIONS = PipelineOptions(device="cpu", threads=1)


def blended_order(
    weights: RerankWeights, probabilities: list[list[float]], values: list[float] | None = None
) -> list[int]:
    """Return the order of three candidates whose retrieval scores are 1, 0.5 and 0."""
    scores = torch.tensor([[1.0, 0.5, 0.0]])
    known = np.array(values or [0.0, 0.0, 0.0])
    log_values = log_item_values(torch.from_numpy(known), median_value(known))
    blended = blend_scores(scores, torch.tensor([probabilities]), log_values[None], weights)
    return blended.argsort(descending=True, stable=True)[0].tolist()


def load(shop, rerank: RerankWeights | None = None) -> Pipeline:
    return Pipeline.load(shop.artifact, replace(OPTIONS, rerank=rerank) if rerank else OPTIONS)


def recommended(pipeline: Pipeline, histories: list[list[Event]], k: int) -> list[list[str]]:
    return [[item.item_id for item in slate.items] for slate in pipeline.recommend(histories, k)]


@pytest.fixture(scope="module")
def histories() -> list[list[Event]]:
    return [[Event(f"u{user}", f"item-{user + step}", "view", 60_000 * step) for step in range(3)] for user in range(5)]


@pytest.mark.parametrize(
    ("task", "full", "strong"),
    [
        ("engagement", RerankWeights(engagement=1.0), RerankWeights(engagement=3.0)),
        ("retention", RerankWeights(retention=1.0), RerankWeights(retention=3.0)),
        ("monetization", RerankWeights(monetization=1.0), RerankWeights(monetization=3.0)),
    ],
)
def test_weight_moves_items_of_its_head_forward(task: str, full: RerankWeights, strong: RerankWeights) -> None:
    probabilities = np.full((3, 3), 0.5)
    probabilities[2, TASKS.index(task)] = 0.99
    assert blended_order(RerankWeights(), probabilities.tolist()) == [0, 1, 2]
    assert blended_order(full, probabilities.tolist()) == [0, 2, 1]
    assert blended_order(strong, probabilities.tolist()) == [2, 0, 1]


def test_full_weights_order_by_the_expected_money() -> None:
    paid = np.array([0.1, 0.3, 0.2])
    values = [8.0, 1.0, 20.0]
    expected = np.exp([1.0, 0.5, 0.0]) * paid * values
    order = blended_order(RerankWeights(monetization=1.0, value=1.0), [[0.5, 0.5, each] for each in paid], values)
    assert order == np.argsort(-expected).tolist()


def test_unknown_value_counts_as_the_median_and_padding_stays_last() -> None:
    values = torch.tensor([1.0, 0.0, 4.0, 2.0])
    log_values = log_item_values(values, median_value(values.numpy()))
    torch.testing.assert_close(log_values.exp(), torch.tensor([1.0, 2.0, 4.0, 2.0]))
    assert log_item_values(torch.zeros(3), median_value(np.zeros(3))).tolist() == [0.0] * 3
    missing = torch.tensor([[-torch.inf]])
    padding = blend_scores(missing, torch.zeros(1, 1, 3), torch.zeros(1, 1), RerankWeights(engagement=1.0))
    assert padding[0, 0] == -np.inf


def test_zero_weights_leave_every_slate_as_it_was(shop, histories: list[list[Event]]) -> None:
    plain = load(shop).recommend(histories, 10)
    assert load(shop, RerankWeights(candidates=40)).recommend(histories, 10) == plain


def test_reranked_slates_are_candidates_with_higher_probabilities(shop, histories: list[list[Event]]) -> None:
    plain = load(shop)
    reranked = load(shop, RerankWeights(monetization=30.0, candidates=40))
    candidates = recommended(plain, histories, 40)
    slates = zip(plain.recommend(histories, 10), reranked.recommend(histories, 10), candidates, strict=True)
    for before, after, pool in slates:
        paid = [sum(item.monetization or 0 for item in slate.items) for slate in (before, after)]
        assert paid[1] > paid[0]
        assert len({item.item_id for item in after.items} & set(pool)) == 10
        scores = [item.score for item in after.items]
        assert scores == sorted(scores, reverse=True)


def test_shorter_slate_is_the_start_of_a_longer_one(shop, histories: list[list[Event]]) -> None:
    pipeline = load(shop, RerankWeights(engagement=1.0))
    assert recommended(pipeline, histories, 5) == [slate[:5] for slate in recommended(pipeline, histories, 20)]


def test_user_without_events_gets_popular_items_in_their_own_order(shop, histories: list[list[Event]]) -> None:
    popular = recommended(load(shop), [[]], 8)[0]
    assert recommended(load(shop, RerankWeights(engagement=5.0)), [[], *histories], 8)[0] == popular


def test_artifact_has_item_values(shop) -> None:
    counters = artifacts.load(shop.artifact).counters
    assert counters["values"].shape == counters["items"].shape
    assert (counters["values"] > 0).mean() > 0.3
