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


def test_labels_that_repeat_each_other_move_the_head_no_more_than_one_of_them() -> None:
    """A hundred users have one outcome each, by the head's own probability, and two hundred labels of it."""
    rng = np.random.default_rng(3)
    moved = []
    for _ in range(40):
        logits = rng.normal(2, 0.5, 100)
        outcomes = (rng.random(100) < sigmoid(logits)).astype(np.float32)
        users = np.repeat(np.arange(100), 200)
        moved.append(fit_platt(logits[users], outcomes[users], users) != IDENTITY)
    assert np.mean(moved) < 0.2, "independent, these labels would move nearly every head"


def test_labels_of_a_few_users_leave_the_head_as_it_is() -> None:
    logits, labels = miscalibrated(900)
    assert fit_platt(logits, labels, np.arange(900) % 9) == IDENTITY
    assert fit_platt(logits, labels, np.arange(900) % 90) != IDENTITY


@pytest.mark.parametrize("row", [[0.0, 0.0], [-1.0, 0.0], [np.nan, 0.0], [1.0, np.inf]])
def test_calibration_that_does_not_keep_the_order_is_rejected(row: list[float]) -> None:
    check_calibration(np.array([IDENTITY] * 3), "model")
    with pytest.raises(ArtifactError, match=r"artifact model: heads.calibration is .* want .*scales above 0"):
        check_calibration(np.array([IDENTITY, row, IDENTITY]), "model")
