import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.training import losses
from pipeline.training.losses import Candidates, next_item_loss, sample_candidates

ROWS, ITEMS, WIDTH = 12, 40, 6
EVERYTHING = Candidates(None, None)
NOTHING_SEEN = np.empty(0, np.int64), np.empty(0, np.int64)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    torch.manual_seed(seed)
    states, table = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ITEMS, WIDTH, requires_grad=True)
    return states, table, np.random.default_rng(seed).integers(1, ITEMS, ROWS)


def test_loss_and_gradients_are_those_of_cross_entropy_over_what_is_not_seen() -> None:
    states, table, targets = problem()
    seen = np.array([0, 0, 3]), np.array([7, 8, 9])
    targets[[0, 3]] = 1
    loss = next_item_loss(states, table, targets, seen, EVERYTHING)
    loss.backward()
    got = loss.item(), states.grad, table.grad
    states.grad = table.grad = None
    mask = torch.zeros(ROWS, ITEMS)
    mask[:, 0] = mask[seen[0], seen[1]] = -torch.inf
    wanted = F.cross_entropy(states @ table.T + mask, torch.from_numpy(targets))
    wanted.backward()
    assert got[0] == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(got[1], states.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[2], table.grad, rtol=1e-4, atol=1e-6)


def test_no_rows_lose_nothing_and_move_nothing() -> None:
    states, table, _ = problem()
    loss = next_item_loss(states[:0], table, np.empty(0, np.int64), NOTHING_SEEN, EVERYTHING)
    loss.backward()
    assert loss.item() == 0
    assert table.grad is not None
    assert not table.grad.any()


def test_a_target_counts_even_where_it_is_listed_as_seen() -> None:
    states, table, targets = problem()
    seen = np.arange(ROWS), targets
    alone = next_item_loss(states, table, targets, NOTHING_SEEN, EVERYTHING)
    assert next_item_loss(states, table, targets, seen, EVERYTHING).item() == pytest.approx(alone.item())


def test_the_correction_makes_a_sample_estimate_the_whole_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FULL_SOFTMAX_ITEMS", 0)
    monkeypatch.setattr(losses, "UNIFORM_NEGATIVES", 10)
    random = np.random.default_rng(4)
    shares = np.append(0.0, random.dirichlet(np.full(ITEMS - 1, 0.5)))
    weights = random.random(ITEMS)
    weights[0] = 0
    estimates = []
    for _ in range(4000):
        candidates = sample_candidates(random.choice(ITEMS, ROWS, p=shares), shares, random)
        assert candidates.tokens is not None
        assert candidates.correction is not None
        estimates.append((weights[candidates.tokens.numpy()] / candidates.correction.exp().numpy()).sum())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - weights.sum()) < 4 * error


def test_a_sampled_loss_scores_each_row_against_the_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FULL_SOFTMAX_ITEMS", 0)
    monkeypatch.setattr(losses, "UNIFORM_NEGATIVES", 5)
    states, table, targets = problem(3)
    shares = np.full(ITEMS, 1 / (ITEMS - 1))
    candidates = sample_candidates(targets, shares, np.random.default_rng(3))
    assert candidates.tokens is not None
    loss = next_item_loss(states, table[candidates.tokens], targets, NOTHING_SEEN, candidates)
    loss.backward()
    outside = np.setdiff1d(np.arange(ITEMS), candidates.tokens.numpy())
    assert table.grad is not None
    assert (table.grad[outside] == 0).all()
    assert (table.grad[targets].abs().sum(1) > 0).all()
