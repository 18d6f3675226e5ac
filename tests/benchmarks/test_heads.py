"""Comparison of two models' AUCs, resampled by user."""

import numpy as np
import pytest

from pipeline.evaluation.metrics import auc
from tests.benchmarks.head_aucs import mean_auc_gain, weighted_aucs


def test_weight_counts_an_event_that_many_times() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random(50)
    labels = (rng.random(50) < 0.4).astype(float)
    times = rng.integers(0, 4, 50)
    [plain, weighted] = weighted_aucs(probabilities, labels, np.stack([np.ones(50), times]))
    assert plain == pytest.approx(auc(probabilities, labels > 0))
    repeated = auc(np.repeat(probabilities, times), np.repeat(labels, times) > 0)
    assert weighted == pytest.approx(repeated, abs=0.02)  # ties


def test_events_with_unknown_labels_do_not_count() -> None:
    [found] = weighted_aucs(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, np.nan]), np.ones((1, 3)))
    assert found == 1.0


def test_interval_of_a_better_model_is_above_zero() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random((4000, 2)) < 0.3).astype(float)
    worse = labels + rng.normal(0, 2.0, labels.shape)
    better = labels + rng.normal(0, 0.5, labels.shape)
    gain, low, high = mean_auc_gain(better, worse, labels, np.repeat(np.arange(400), 10))
    assert 0 < low < gain < high


def test_gain_of_a_model_over_itself_is_zero() -> None:
    rng = np.random.default_rng(2)
    probabilities = rng.random((300, 3))
    labels = (rng.random((300, 3)) < 0.5).astype(float)
    assert mean_auc_gain(probabilities, probabilities, labels, np.arange(300) // 10) == (0.0, 0.0, 0.0)
