import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.training import losses
from pipeline.training.losses import Candidates, next_item_loss, sample_candidates

ROWS = 12
ITEMS = 40
WIDTH = 6
ALL_ITEMS = Candidates(None, None)
NOTHING_SEEN = np.empty(0, np.int64), np.empty(0, np.int64)


def random_problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return states, item table and targets."""
    torch.manual_seed(seed)
    states = torch.randn(ROWS, WIDTH, requires_grad=True)
    table = torch.randn(ITEMS, WIDTH, requires_grad=True)
    return states, table, np.random.default_rng(seed).integers(1, ITEMS, ROWS)


@pytest.fixture
def sampled_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FULL_SOFTMAX_ITEMS", 0)
    monkeypatch.setattr(losses, "UNIFORM_NEGATIVES", 8)


def test_loss_and_gradients_equal_cross_entropy_over_unseen_items() -> None:
    states, table, targets = random_problem()
    seen = np.array([0, 0, 3]), np.array([7, 8, 9])
    targets[[0, 3]] = 1
    loss = next_item_loss(states, table, targets, seen, ALL_ITEMS)
    loss.backward()
    states_grad = states.grad
    table_grad = table.grad
    states.grad = None
    table.grad = None
    mask = torch.zeros(ROWS, ITEMS)
    mask[:, 0] = -torch.inf
    mask[seen[0], seen[1]] = -torch.inf
    expected = F.cross_entropy(states @ table.T + mask, torch.from_numpy(targets))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(states_grad, states.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table_grad, table.grad, rtol=1e-4, atol=1e-6)


def test_loss_of_no_rows_is_zero_without_gradient() -> None:
    states, table, _ = random_problem()
    loss = next_item_loss(states[:0], table, np.empty(0, np.int64), NOTHING_SEEN, ALL_ITEMS)
    loss.backward()
    assert loss.item() == 0
    assert table.grad is not None
    assert not table.grad.any()


def test_target_counts_even_if_it_is_listed_as_seen() -> None:
    states, table, targets = random_problem()
    seen = np.arange(ROWS), targets
    unmasked = next_item_loss(states, table, targets, NOTHING_SEEN, ALL_ITEMS)
    assert next_item_loss(states, table, targets, seen, ALL_ITEMS).item() == pytest.approx(unmasked.item())


@pytest.mark.usefixtures("sampled_softmax")
def test_correction_makes_the_sample_an_unbiased_estimate_of_the_full_sum() -> None:
    rng = np.random.default_rng(4)
    frequency = np.append(0.0, rng.dirichlet(np.full(ITEMS - 1, 0.5)))
    weights = rng.random(ITEMS)
    weights[0] = 0
    estimates = []
    for _ in range(4000):
        candidates = sample_candidates(rng.choice(ITEMS, ROWS, p=frequency), frequency, rng)
        assert candidates.tokens is not None
        assert candidates.correction is not None
        estimates.append((weights[candidates.tokens.numpy()] / candidates.correction.exp().numpy()).sum())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - weights.sum()) < 4 * error


@pytest.mark.usefixtures("sampled_softmax")
def test_sampled_loss_scores_each_row_against_the_sample_alone() -> None:
    states, table, targets = random_problem(3)
    frequency = np.full(ITEMS, 1 / (ITEMS - 1))
    candidates = sample_candidates(targets, frequency, np.random.default_rng(3))
    assert candidates.tokens is not None
    loss = next_item_loss(states, table[candidates.tokens], targets, NOTHING_SEEN, candidates)
    loss.backward()
    outside = np.setdiff1d(np.arange(ITEMS), candidates.tokens.numpy())
    assert table.grad is not None
    assert (table.grad[outside] == 0).all()
    assert (table.grad[targets].abs().sum(1) > 0).all()
