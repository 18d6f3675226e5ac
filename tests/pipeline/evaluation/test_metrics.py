import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics import (
    auc,
    calibration_curve,
    expected_calibration_error,
    head_metrics,
    ranking_metrics,
    target_ranks,
)


def draw_labels(probabilities: np.ndarray, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(probabilities)) < probabilities).astype(np.float32)


def test_ranks_start_at_one_and_an_unknown_item_never_hits() -> None:
    slates = np.array([[4, 2, 9], [4, 2, 9], [0, 0, 0], [1, 0, 0]])
    assert target_ranks(slates, np.array([9, 3, 0, 1])).tolist() == [3, 0, 0, 1]


def test_events_without_a_hit_stay_in_the_denominator() -> None:
    metrics = ranking_metrics(np.array([1, 0, 3, 0]), 10)
    assert metrics.events == 4
    assert metrics.hit_rate == 0.5
    assert metrics.ndcg == pytest.approx((1 + 0.5) / 4)
    assert metrics.mrr == pytest.approx((1 + 1 / 3) / 4)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auc_is_the_fraction_of_correctly_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    """Ties count half."""
    positives = [score for score, positive in rows if positive]
    negatives = [score for score, positive in rows if not positive]
    value = auc(np.array([score for score, _ in rows], float), np.array([positive for _, positive in rows]))
    if not positives or not negatives:
        assert value is None
    else:
        wins = sum((one > zero) + 0.5 * (one == zero) for one in positives for zero in negatives)
        assert value == pytest.approx(wins / (len(positives) * len(negatives)))


def test_unknown_labels_do_not_count_in_head_metrics() -> None:
    probabilities = np.array([0.9, 0.2, 0.5, 0.4], np.float32)
    metrics = head_metrics(probabilities, np.array([1, 0, np.nan, 1], np.float32))
    assert (metrics.labels, metrics.auc) == (3, 1.0)
    assert metrics.log_loss == pytest.approx(-np.log([0.9, 0.8, 0.4]).mean(), rel=1e-5)
    assert head_metrics(probabilities, np.full(4, np.nan)).auc is None


def test_calibration_curve_has_bins_of_equal_mass_by_probability() -> None:
    probabilities = np.linspace(0, 1, 100)[::-1]
    curve = calibration_curve(probabilities, (probabilities > 0.5).astype(float), bins=4)
    assert [point.labels for point in curve] == [25] * 4
    assert [point.positive_rate for point in curve] == [0, 0, 1, 1]
    assert [point.probability for point in curve] == pytest.approx([0.1212, 0.3737, 0.6263, 0.8788], abs=1e-4)


def test_calibration_error_is_zero_for_true_probabilities_and_the_excess_for_inflated_ones() -> None:
    probabilities = np.random.default_rng(1).uniform(0.1, 0.7, 200_000)
    labels = draw_labels(probabilities)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0, abs=0.006)
    assert expected_calibration_error(probabilities + 0.2, labels) == pytest.approx(0.2, abs=0.006)


def test_calibration_errors_that_cancel_in_the_mean_still_count() -> None:
    probabilities = np.array([0.1] * 50 + [0.9] * 50)
    labels = np.array([1.0] * 50 + [0.0] * 50)
    assert probabilities.mean() == labels.mean()
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(0.9)


def test_unknown_labels_do_not_count_in_the_calibration_curve() -> None:
    probabilities = np.array([0.2, 0.9, 0.4])
    labels = np.array([0.0, np.nan, 1.0])
    curve = calibration_curve(probabilities, labels)
    assert [(point.labels, point.probability) for point in curve] == [(1, 0.2), (1, 0.4)]
    assert calibration_curve(probabilities, np.full(3, np.nan)) == []
    assert expected_calibration_error(probabilities, np.full(3, np.nan)) is None
