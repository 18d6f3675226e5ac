import pytest
import torch
from torch import Tensor

from pipeline.training.loss_weighting import WEIGHTINGS, DynamicWeightAverage, WeightingName, make_weighting


def total_loss(weighting: torch.nn.Module, *losses: float) -> float:
    return weighting(torch.tensor(losses)).item()


def dwa_factors(*epochs: list[float]) -> Tensor:
    """Return the factors after epochs with these losses."""
    weighting = make_weighting("dwa", (1.0, 1.0, 1.0))
    assert isinstance(weighting, DynamicWeightAverage)
    for losses in epochs:
        weighting.epoch_ended(torch.tensor(losses))
    return weighting.factors()


def test_fixed_weights_are_a_weighted_sum() -> None:
    assert total_loss(make_weighting("fixed", (0.5, 0.0, 2.0)), 1.0, 7.0, 3.0) == pytest.approx(6.5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_new_weighting_equals_fixed_weights(name: WeightingName) -> None:
    assert total_loss(make_weighting(name, (0.3, 0.3, 0.3)), 1.0, 2.0, 3.0) == pytest.approx(1.8)


def test_uncertainty_converges_to_one_over_twice_the_loss() -> None:
    weighting = make_weighting("uncertainty", (0.3, 0.3, 0.3))
    losses = torch.tensor([0.1, 0.5, 2.0])
    optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    [log_variances] = weighting.parameters()
    torch.testing.assert_close(torch.exp(-log_variances).detach(), 1 / (2 * losses), rtol=1e-3, atol=0)


def test_dwa_favours_the_loss_that_falls_slowest_and_keeps_the_sum() -> None:
    factors = dwa_factors([2.0, 1.0, 1.0], [1.0, 0.9, 1.0])  # ratios 0.5, 0.9, 1.0
    torch.testing.assert_close(factors, 3 * torch.softmax(torch.tensor([0.25, 0.45, 0.5]), 0))
    assert factors[2] > factors[1] > factors[0]
    assert factors.sum().item() == pytest.approx(3)


def test_dwa_weighs_equally_for_two_epochs_and_treats_a_zero_loss_as_constant() -> None:
    torch.testing.assert_close(dwa_factors(), torch.ones(3))
    torch.testing.assert_close(dwa_factors([1.0, 2.0, 3.0]), torch.ones(3))
    torch.testing.assert_close(dwa_factors([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]), torch.ones(3))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_state_dict_restores_a_weighting(name: WeightingName) -> None:
    first = make_weighting(name, (0.1, 0.2, 0.3))
    second = make_weighting(name, (0.1, 0.2, 0.3))
    first.epoch_ended(torch.tensor([1.0, 2.0, 3.0]))
    first.epoch_ended(torch.tensor([0.9, 1.0, 2.9]))
    for parameter in first.parameters():
        torch.nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    assert total_loss(first, 1.0, 2.0, 3.0) == total_loss(second, 1.0, 2.0, 3.0)
