"""Intervals over users and seeds: they widen with the spread of the seeds, and pair rankings by user."""

import numpy as np
import pytest

from tests.benchmarks.accuracy_intervals import Estimate

USERS = np.repeat(np.arange(200), 5)


def draw_ranks(rng: np.random.Generator, hit_rate: float) -> np.ndarray:
    """Return int [events]: rank 1 with this probability, otherwise none."""
    return (rng.random(len(USERS)) < hit_rate).astype(int)


def width(bounds: tuple[float, float, float]) -> float:
    _, low, high = bounds
    return high - low


def test_mean_is_over_all_seeds() -> None:
    rng = np.random.default_rng(0)
    ranks = [draw_ranks(rng, rate) for rate in (0.2, 0.4)]
    estimate = Estimate.from_ranks(ranks, USERS, 0)
    assert estimate.at("hr10")[0] == pytest.approx(np.mean(ranks))
    assert estimate.at("ndcg5")[0] == pytest.approx(np.mean(ranks)), "rank 1 gains 1"


def test_interval_includes_the_spread_of_the_seeds() -> None:
    rng = np.random.default_rng(0)
    alike = Estimate.from_ranks([draw_ranks(rng, 0.3) for _ in range(3)], USERS, 0)
    apart = Estimate.from_ranks([draw_ranks(rng, rate) for rate in (0.1, 0.3, 0.5)], USERS, 0)
    assert width(apart.at("hr10")) > 3 * width(alike.at("hr10"))


def test_gain_over_a_ranking_with_the_same_hits_has_no_width_when_neither_has_several_seeds() -> None:
    ranks = draw_ranks(np.random.default_rng(0), 0.3)
    ours = Estimate.from_ranks([ranks], USERS, 0)
    theirs = Estimate.from_ranks([ranks], USERS, 1)
    assert ours.gain_over(theirs, "ndcg10") == (0.0, 0.0, 0.0)


def test_seeds_of_two_rankings_are_drawn_independently() -> None:
    rng = np.random.default_rng(0)
    ranks = [draw_ranks(rng, rate) for rate in (0.2, 0.3, 0.4)]
    gain = Estimate.from_ranks(ranks, USERS, 0).gain_over(Estimate.from_ranks(ranks, USERS, 1), "hr10")
    assert gain is not None
    assert gain[0] == 0
    assert width(gain) > 0.2, "each ranking had its own luck"
