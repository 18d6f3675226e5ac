import numpy as np
import pytest

from pipeline.evaluation.metrics import auc
from tests.benchmarks.head_aucs import mean_auc_gain, weighted_aucs


def test_weights_count_events_as_if_they_stood_there_so_often():
    random = np.random.default_rng(0)
    odds, labels = random.random(50), (random.random(50) < 0.4).astype(float)
    times = random.integers(0, 4, 50)
    [plain, weighted] = weighted_aucs(odds, labels, np.stack([np.ones(50), times]))
    assert plain == pytest.approx(auc(odds, labels > 0))
    assert weighted == pytest.approx(auc(np.repeat(odds, times), np.repeat(labels, times) > 0), abs=0.02)  # ties


def test_events_whose_label_is_not_known_yet_do_not_count():
    [found] = weighted_aucs(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, np.nan]), np.ones((1, 3)))
    assert found == 1.0


def test_a_better_head_is_ahead_with_its_whole_interval():
    random = np.random.default_rng(1)
    labels = (random.random((4000, 2)) < 0.3).astype(float)
    worse = labels + random.normal(0, 2.0, labels.shape)
    better = labels + random.normal(0, 0.5, labels.shape)
    gain, low, high = mean_auc_gain(better, worse, labels, np.repeat(np.arange(400), 10))
    assert 0 < low < gain < high


def test_a_model_is_not_ahead_of_itself():
    random = np.random.default_rng(2)
    odds, labels = random.random((300, 3)), (random.random((300, 3)) < 0.5).astype(float)
    assert mean_auc_gain(odds, odds, labels, np.arange(300) // 10) == (0.0, 0.0, 0.0)
