import numpy as np
import pytest

from pipeline.evaluation.bootstrap import interval, resampled_means
from pipeline.evaluation.comparison import Comparison


def test_resampled_means_draw_full_users_with_replacement() -> None:
    values = np.array([[1.0], [1.0], [4.0]])
    users = np.array([7, 7, 9])
    samples = resampled_means(values, users, resamples=4000)[:, 0]
    means, counts = np.unique(samples.round(6), return_counts=True)
    assert means.tolist() == [1.0, 2.0, 4.0], "two of the first user, one each, two of the second"
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_interval_covers_the_true_mean_at_its_level() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        levels = rng.normal(2, 1, 60)  # users differ, and their events lie around their own level
        values = (levels[:, None] + rng.normal(0, 0.2, (60, 5))).reshape(-1, 1)
        low, high = interval(resampled_means(values, np.repeat(np.arange(60), 5), 400, seed))
        covered += bool(low[0] <= 2 <= high[0])
    assert 0.89 < covered / 200 < 0.99


def test_same_seed_resamples_the_same_users_in_every_call() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((50, 2))
    users = rng.integers(0, 9, 50)
    together = resampled_means(values, users, 100, seed=5)
    apart = np.column_stack([resampled_means(values[:, [i]], users, 100, seed=5)[:, 0] for i in (0, 1)])
    assert together == pytest.approx(apart)
    assert not np.allclose(together, resampled_means(values, users, 100, seed=6))


def test_paired_difference_is_significant_where_single_intervals_overlap() -> None:
    """One ranker is a rank better than the other at every event, while users differ widely."""
    rng = np.random.default_rng(1)
    users = np.repeat(np.arange(40), 10)
    worse = np.repeat(rng.integers(2, 50, 40), 10)
    comparison = Comparison.from_ranks({"better": worse - 1, "worse": worse}, users, (50,), 500, 0)
    better_mrr = comparison.at("better")[50].mrr
    worse_mrr = comparison.at("worse")[50].mrr
    difference = comparison.difference("better", "worse")[50].mrr
    assert better_mrr.low < worse_mrr.high, "the single intervals overlap"
    assert 0 < difference.low < difference.value < difference.high
    assert difference.value == pytest.approx((1 / (worse - 1) - 1 / worse).mean())


def test_rank_beyond_the_cutoff_is_not_a_hit() -> None:
    ranks = np.array([1, 3, 11, 0])
    at = Comparison.from_ranks({"one": ranks}, np.arange(4), (1, 5, 20), 10, 0).at("one")
    assert [at[cutoff].hit_rate.value for cutoff in (1, 5, 20)] == [0.25, 0.5, 0.75]
    assert at[5].ndcg.value == pytest.approx((1 + 0.5) / 4)
    assert at[20].mrr.value == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)
