import numpy as np
import pytest

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.beyond_accuracy import beyond_accuracy, category_vectors, cooccurrence_vectors
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Item

COUNTS = np.array([0, 5, 3, 1, 1])
NO_VECTORS = np.zeros((5, 2))


def test_coverage_is_the_fraction_of_items_on_any_slate_without_padding() -> None:
    assert beyond_accuracy(np.array([[1, 2], [2, 0]]), COUNTS, NO_VECTORS).coverage == 0.5


def test_novelty_is_the_mean_self_information_of_smoothed_item_frequency() -> None:
    metrics = beyond_accuracy(np.array([[1, 3]]), COUNTS, NO_VECTORS)
    assert metrics.novelty == pytest.approx(-(np.log2(6 / 15) + np.log2(2 / 15)) / 2)


def test_diversity_is_one_minus_the_mean_cosine_of_a_slates_items() -> None:
    vectors = np.random.default_rng(2).normal(size=(9, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[0] = 0
    slates = np.array([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
    cosines = [np.mean([vectors[i] @ vectors[j] for i, j in [(1, 2), (1, 3), (2, 3)]]), vectors[4] @ vectors[5]]
    assert beyond_accuracy(slates, np.ones(9), vectors).diversity == pytest.approx(1 - np.mean(cosines))
    assert beyond_accuracy(np.array([[6, 0, 0]]), np.ones(9), vectors).diversity is None


def test_category_vectors_are_similar_when_categories_are_shared() -> None:
    vocabulary = Vocabulary(["a", "b", "c", "d"])
    records = [Item("a", category=["x", "y"]), Item("b", category=["y", "x"]), Item("c", category=["z"])]
    vectors = category_vectors(records, vocabulary)
    assert vectors[1] @ vectors[2] == pytest.approx(1, abs=1e-6)
    assert abs(vectors[1] @ vectors[3]) < 0.5
    assert not vectors[4].any(), "an item without a record"


def test_cooccurrence_vectors_estimate_the_cosines_of_user_sets() -> None:
    """The sketch's cosines are right on average: 400 pairs against the exact ones."""
    rng = np.random.default_rng(0)
    events = [Event(f"u{rng.integers(60)}", f"i{rng.integers(21)}", "view", n) for n in range(700)]
    log = event_log_from_blocks([events], EventSchema())
    vocabulary = Vocabulary(log.item_ids)
    train = UserSequences.from_log(log, vocabulary)
    vectors = cooccurrence_vectors(train, len(vocabulary))
    touched = np.zeros((len(vocabulary), 60))
    touched[train.tokens, np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))] = 1
    exact = touched[1:] / np.linalg.norm(touched[1:], axis=1, keepdims=True)
    errors = (vectors[1:] @ vectors[1:].T - exact @ exact.T)[~np.eye(21, dtype=bool)]
    assert abs(errors.mean()) < 0.03
    assert errors.std() < 0.2
