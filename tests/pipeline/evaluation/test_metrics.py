import numpy as np
import pytest

from pipeline.evaluation.metrics import calibration_curve, expected_calibration_error


def drawn(odds: np.ndarray, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(odds)) < odds).astype(np.float32)


def test_a_reliability_curve_has_bins_of_equal_mass_from_low_odds_to_high() -> None:
    odds = np.linspace(0, 1, 100)[::-1]
    curve = calibration_curve(odds, (odds > 0.5).astype(float), bins=4)
    assert [point.labels for point in curve] == [25] * 4
    assert [point.positive_rate for point in curve] == [0, 0, 1, 1]
    assert [point.probability for point in curve] == pytest.approx([0.1212, 0.3737, 0.6263, 0.8788], abs=1e-4)


def test_odds_that_come_true_have_next_to_no_calibration_error_and_boasting_ones_their_excess() -> None:
    odds = np.random.default_rng(1).uniform(0.1, 0.7, 200_000)
    labels = drawn(odds)
    assert expected_calibration_error(odds, labels) == pytest.approx(0, abs=0.006)
    assert expected_calibration_error(odds + 0.2, labels) == pytest.approx(0.2, abs=0.006)


def test_two_errors_that_cancel_in_the_mean_still_count() -> None:
    odds, labels = np.array([0.1] * 50 + [0.9] * 50), np.array([1.0] * 50 + [0.0] * 50)
    assert odds.mean() == labels.mean()
    assert expected_calibration_error(odds, labels, bins=2) == pytest.approx(0.9)


def test_unknown_labels_are_left_out_of_the_curve_and_without_any_there_is_none() -> None:
    odds, labels = np.array([0.2, 0.9, 0.4]), np.array([0.0, np.nan, 1.0])
    assert [(point.labels, point.probability) for point in calibration_curve(odds, labels)] == [(1, 0.2), (1, 0.4)]
    assert calibration_curve(odds, np.full(3, np.nan)) == []
    assert expected_calibration_error(odds, np.full(3, np.nan)) is None
