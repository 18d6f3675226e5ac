from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.evaluation.metrics import auc, expected_calibration_error
from pipeline.model.calibration import IDENTITY, check_calibration, fit_platt


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def miscalibrated(n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a head that is overconfident by a factor of 2 and biased by 1.5, and labels."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(-1, 1, n)
    return 2 * true_logits + 1.5, (rng.random(n) < sigmoid(true_logits)).astype(np.float32)


def each_its_own(labels: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return a user per label."""
    return np.arange(len(labels))


def test_fit_recovers_the_scaling() -> None:
    logits, labels = miscalibrated()
    scale, shift = fit_platt(logits, labels, each_its_own(labels))
    assert scale == pytest.approx(0.5, abs=0.03)
    assert shift == pytest.approx(-0.75, abs=0.06)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 3.0), (2.0, 1.5), (3.0, 0.0), (3.0, -2.0), (0.3, 0.0)])
@pytest.mark.parametrize("mean", [-1.0, 0.5])
def test_heads_that_are_far_off_are_scaled_too(factor: float, shift: float, mean: float) -> None:
    rng = np.random.default_rng(6)
    true_logits = rng.normal(mean, 1, 8000)
    labels = (rng.random(8000) < sigmoid(true_logits)).astype(np.float32)
    found = fit_platt(factor * true_logits + shift, labels, each_its_own(labels))
    assert found[0] * factor == pytest.approx(1, abs=0.15)
    assert found[0] * shift + found[1] == pytest.approx(0, abs=0.4)


def test_fit_calibrates_held_out_labels_and_keeps_their_order() -> None:
    logits, labels = miscalibrated(seed=1)
    scale, shift = fit_platt(logits, labels, each_its_own(labels))
    logits, labels = miscalibrated(seed=2)
    before = sigmoid(logits)
    after = sigmoid(scale * logits + shift)
    error_before = expected_calibration_error(before, labels)
    error_after = expected_calibration_error(after, labels)
    assert error_before is not None
    assert error_after is not None
    assert error_before > 0.12
    assert error_after < 0.015
    assert auc(before, labels > 0.5) == pytest.approx(auc(after, labels > 0.5), abs=1e-9)


def test_nan_labels_are_ignored() -> None:
    logits, labels = miscalibrated(2000)
    padded = np.concatenate([labels, np.full(500, np.nan)])
    found = fit_platt(np.concatenate([logits, np.full(500, 9.0)]), padded, each_its_own(padded))
    assert found == fit_platt(logits, labels, each_its_own(labels)) != IDENTITY


@pytest.mark.parametrize("labels", [[], [1, 1, 1], [0, 0, 0], [np.nan] * 3])
def test_labels_of_one_class_leave_the_head_as_it_is(labels: list[float]) -> None:
    assert fit_platt(np.linspace(-1, 1, len(labels)), np.array(labels), each_its_own(labels)) == IDENTITY


def test_few_labels_move_the_head_only_a_little() -> None:
    logits, labels = miscalibrated()
    scale, shift = fit_platt(logits[:10], labels[:10], each_its_own(labels[:10]))
    assert 0.8 < scale < 1.2
    assert abs(shift) < 0.4


def test_head_with_reversed_order_is_left_as_it_is() -> None:
    logits, labels = miscalibrated()
    assert fit_platt(-logits, labels, each_its_own(labels)) == IDENTITY


@pytest.mark.parametrize("shared", ["user", "period"])
def test_labels_that_repeat_each_other_move_the_head_no_more_than_one_of_them(shared: str) -> None:
    """A hundred users, or weeks, have one outcome each, by the head's own probability, and two hundred labels of it."""
    rng = np.random.default_rng(3)
    moved = []
    for _ in range(40):
        logits = rng.normal(2, 0.5, 100)
        outcomes = (rng.random(100) < sigmoid(logits)).astype(np.float32)
        groups = np.repeat(np.arange(100), 200)
        others = np.arange(len(groups))
        users, periods = (groups, others) if shared == "user" else (others, groups)
        moved.append(fit_platt(logits[groups], outcomes[groups], users, periods) != IDENTITY)
    assert np.mean(moved) < 0.2, "independent, these labels would move nearly every head"


@pytest.mark.parametrize("periods", [3, 5, 12])
def test_a_right_head_is_seldom_scaled_however_few_the_periods(periods: int) -> None:
    """In each period all users return more or less often: a shift of their logits, 0 in the mean."""
    rng = np.random.default_rng(4)
    scaled = []
    for _ in range(200):
        logits = rng.normal(0, 1, 2000)
        period = np.arange(2000) % periods
        outcomes = (rng.random(2000) < sigmoid(logits + rng.normal(0, 0.4, periods)[period])).astype(np.float32)
        scaled.append(fit_platt(logits, outcomes, np.arange(2000), period) != IDENTITY)
    assert np.mean(scaled) < 0.12


def test_labels_of_few_users_or_periods_leave_the_head_as_it_is() -> None:
    logits, labels = miscalibrated(900)
    each = np.arange(900)
    for few in (each % 1, each % 2):
        assert fit_platt(logits, labels, few, each) == IDENTITY
        assert fit_platt(logits, labels, each, few) == IDENTITY
    assert fit_platt(logits, labels, each % 90, each % 12) != IDENTITY


def test_constant_logits_are_shifted_to_the_labels_mean() -> None:
    rng = np.random.default_rng(5)
    labels = (rng.random(5000) < 0.6).astype(np.float32)
    scale, shift = fit_platt(np.ones(5000), labels, each_its_own(labels))
    assert sigmoid(np.array(scale + shift)) == pytest.approx(labels.mean(), abs=0.01)


def test_a_head_that_is_a_little_off_is_scaled_once_its_labels_show_it() -> None:
    """Of 400 labels a shift of 0.4 is seldom significant at 0.1 %, and often at 5 %."""
    rng = np.random.default_rng(7)
    scaled = []
    for _ in range(200):
        logits = rng.normal(0, 1, 400)
        labels = (rng.random(400) < sigmoid(logits + 0.4)).astype(np.float32)
        scaled.append(fit_platt(logits, labels, each_its_own(labels)) != IDENTITY)
    assert 0.7 < np.mean(scaled) < 0.99


@pytest.mark.parametrize("row", [[0.0, 0.0], [-1.0, 0.0], [np.nan, 0.0], [1.0, np.inf]])
def test_calibration_that_does_not_keep_the_order_is_rejected(row: list[float]) -> None:
    check_calibration(np.array([IDENTITY] * 3), "model")
    with pytest.raises(ArtifactError, match=r"artifact model: heads.calibration is .* want .*scales above 0"):
        check_calibration(np.array([IDENTITY, row, IDENTITY]), "model")
