import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.evaluation.metrics import auc, expected_calibration_error
from pipeline.model.calibration import IDENTITY, check_calibration, fit_platt


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def skewed(n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a head that is twice too sure of itself and promises too much, and labels that know better."""
    random = np.random.default_rng(seed)
    truth = random.normal(-1, 1, n)
    return 2 * truth + 1.5, (random.random(n) < sigmoid(truth)).astype(np.float32)


def test_the_scaling_that_was_lost_is_found_again() -> None:
    logits, labels = skewed()
    scale, shift = fit_platt(logits, labels)
    assert scale == pytest.approx(0.5, abs=0.03)
    assert shift == pytest.approx(-0.75, abs=0.06)


def test_calibrated_odds_come_true_on_labels_that_were_not_fitted_and_keep_their_order() -> None:
    scale, shift = fit_platt(*skewed(seed=1))
    logits, labels = skewed(seed=2)
    before, after = sigmoid(logits), sigmoid(scale * logits + shift)
    worse, better = expected_calibration_error(before, labels), expected_calibration_error(after, labels)
    assert worse is not None
    assert better is not None
    assert worse > 0.12
    assert better < 0.015
    assert auc(before, labels > 0.5) == pytest.approx(auc(after, labels > 0.5), abs=1e-9)


def test_unknown_labels_do_not_count() -> None:
    logits, labels = skewed(2000)
    padded = np.concatenate([labels, np.full(500, np.nan)])
    assert fit_platt(np.concatenate([logits, np.full(500, 9.0)]), padded) == fit_platt(logits, labels)


@pytest.mark.parametrize("labels", [[], [1, 1, 1], [0, 0, 0], [np.nan] * 3])
def test_labels_that_are_all_alike_leave_a_head_as_it_is(labels: list[float]) -> None:
    assert fit_platt(np.linspace(-1, 1, len(labels)), np.array(labels)) == IDENTITY


def test_a_few_labels_move_a_head_only_a_little() -> None:
    logits, labels = skewed()
    scale, shift = fit_platt(logits[:10], labels[:10])
    assert 0.8 < scale < 1.2
    assert abs(shift) < 0.4


def test_a_head_that_orders_backwards_is_left_as_it_is() -> None:
    logits, labels = skewed()
    assert fit_platt(-logits, labels) == IDENTITY


@pytest.mark.parametrize("row", [[0.0, 0.0], [-1.0, 0.0], [np.nan, 0.0], [1.0, np.inf]])
def test_a_calibration_that_keeps_no_order_is_refused_in_one_sentence(row: list[float]) -> None:
    check_calibration(np.array([IDENTITY] * 3), "model")
    with pytest.raises(ArtifactError, match=r"artifact model: heads.calibration is .* want .*scales above 0"):
        check_calibration(np.array([IDENTITY, row, IDENTITY]), "model")
