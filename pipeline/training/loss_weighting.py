"""How the heads' losses are weighed against each other. The retrieval loss has weight 1: it anchors the scale.

fixed        the options' weights as they are
uncertainty  each weight times exp(-s) of a learnt log-variance s, for the price of s / 2
dwa          each weight times how slowly its loss falls, from epoch to epoch
"""

from typing import Literal

import torch
from torch import Tensor, nn

WeightingName = Literal["fixed", "uncertainty", "dwa"]
DWA_TEMPERATURE = 2.0  # of the softmax over the losses' rates, as in the paper


class FixedWeights(nn.Module):
    """The weighted sum of the losses."""

    weights: Tensor

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def forward(self, losses: Tensor) -> Tensor:
        """losses: float [tasks] -> their sum as the optimizer sees it, a scalar"""
        return self.weights @ losses

    def epoch_ended(self, losses: Tensor) -> None:
        """losses: float [tasks], means over the epoch that has just ended."""


class UncertaintyWeights(FixedWeights):
    """Homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR 2018, section 3.2), of classification: a task's loss L
    becomes L / sigma^2 + log sigma, with s = log sigma^2 learnt; at rest exp(-s) is 1 / (2 L)."""

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__(weights)
        self.log_variances = nn.Parameter(torch.zeros(len(weights)))

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(torch.exp(-self.log_variances) * losses + self.log_variances / 2)


class DynamicWeightAverage(FixedWeights):
    """Dynamic weight average (Liu, Johns & Davison, CVPR 2019, equation 7): with r the ratio of a task's last two
    epoch losses, its weight is multiplied by tasks * softmax(r / temperature); by 1 in the first two epochs."""

    history: Tensor

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__(weights)
        self.register_buffer("history", torch.zeros(2, len(weights)))  # the epoch before the last, the last; 0 = none

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(self.factors() * losses)

    def factors(self) -> Tensor:
        """float [tasks], 1 on average"""
        earlier, last = self.history
        rates = torch.where((earlier > 0) & (last > 0), last / earlier, 1.0)
        return len(rates) * torch.softmax(rates / DWA_TEMPERATURE, dim=0)

    def epoch_ended(self, losses: Tensor) -> None:
        self.history = torch.stack([self.history[1], losses.to(self.history)])


WEIGHTINGS: dict[WeightingName, type[FixedWeights]] = {
    "fixed": FixedWeights,
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
}


def make_weighting(name: WeightingName, weights: tuple[float, ...]) -> FixedWeights:
    """Of that name, from these weights, one a task. Its state_dict is what an exact resume needs."""
    return WEIGHTINGS[name](weights)
