import pytest
import torch
from torch import Tensor

from pipeline.training.loss_weighting import WEIGHTINGS, DynamicWeightAverage, WeightingName, make_weighting


def loss_of(weighting: torch.nn.Module, *losses: float) -> float:
    return weighting(torch.tensor(losses)).item()


def test_fixed_weights_are_a_weighted_sum() -> None:
    assert loss_of(make_weighting("fixed", (0.5, 0.0, 2.0)), 1.0, 7.0, 3.0) == pytest.approx(6.5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_before_anything_is_learnt_every_weighting_is_the_fixed_one(name: WeightingName) -> None:
    assert loss_of(make_weighting(name, (0.3, 0.3, 0.3)), 1.0, 2.0, 3.0) == pytest.approx(1.8)


def test_learnt_uncertainty_comes_to_rest_where_a_weight_is_one_over_twice_its_loss() -> None:
    weighting, losses = make_weighting("uncertainty", (0.3, 0.3, 0.3)), torch.tensor([0.1, 0.5, 2.0])
    optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    [log_variances] = weighting.parameters()
    torch.testing.assert_close(torch.exp(-log_variances).detach(), 1 / (2 * losses), rtol=1e-3, atol=0)


def dwa(*epochs: list[float]) -> Tensor:
    weighting = make_weighting("dwa", (1.0, 1.0, 1.0))
    assert isinstance(weighting, DynamicWeightAverage)
    for losses in epochs:
        weighting.epoch_ended(torch.tensor(losses))
    return weighting.factors()


def test_dwa_favours_the_loss_that_falls_slowest_and_keeps_the_sum() -> None:
    factors = dwa([2.0, 1.0, 1.0], [1.0, 0.9, 1.0])  # rates 0.5, 0.9, 1.0
    torch.testing.assert_close(factors, 3 * torch.softmax(torch.tensor([0.25, 0.45, 0.5]), 0))
    assert factors[2] > factors[1] > factors[0]
    assert factors.sum().item() == pytest.approx(3)


def test_dwa_weighs_all_alike_until_two_epochs_are_known_and_a_head_without_labels_as_one_that_stands() -> None:
    torch.testing.assert_close(dwa(), torch.ones(3))
    torch.testing.assert_close(dwa([1.0, 2.0, 3.0]), torch.ones(3))
    torch.testing.assert_close(dwa([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]), torch.ones(3))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weightings_state_restores_it(name: WeightingName) -> None:
    first, second = make_weighting(name, (0.1, 0.2, 0.3)), make_weighting(name, (0.1, 0.2, 0.3))
    first.epoch_ended(torch.tensor([1.0, 2.0, 3.0]))
    first.epoch_ended(torch.tensor([0.9, 1.0, 2.9]))
    for parameter in first.parameters():
        torch.nn.init.uniform_(parameter)
    second.load_state_dict(first.state_dict())
    assert loss_of(first, 1.0, 2.0, 3.0) == loss_of(second, 1.0, 2.0, 3.0)
