"""Weights of the heads' losses. The retrieval loss has weight 1: it anchors the scale.

fixed        the options' weights as they are
uncertainty  each weight times exp(-s) of a learned log-variance s, plus the regulariser s / 2
dwa          each weight times a factor that grows the more slowly its loss falls, updated per epoch
"""

from typing import Literal

import torch
from torch import Tensor, nn

WeightingName = Literal["fixed", "uncertainty", "dwa"]
DWA_TEMPERATURE = 2.0  # softmax temperature over the losses' ratios, as in the paper


class FixedWeights(nn.Module):
    """The weighted sum of the losses."""

    weights: Tensor

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights), persistent=False)

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted sum, a scalar. losses: float [tasks]"""
        return self.weights @ losses

    def epoch_ended(self, losses: Tensor) -> None:
        """Record an epoch's mean losses, float [tasks]."""


class UncertaintyWeights(FixedWeights):
    """Homoscedastic uncertainty for classification (Kendall, Gal & Cipolla, CVPR 2018, section 3.2).

    A task's loss L becomes L / sigma^2 + log sigma, with s = log sigma^2 learned; at the optimum exp(-s) is 1 / (2 L).
    """

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__(weights)
        self.log_variances = nn.Parameter(torch.zeros(len(weights)))

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(torch.exp(-self.log_variances) * losses + self.log_variances / 2)


class DynamicWeightAverage(FixedWeights):
    """Dynamic weight average (Liu, Johns & Davison, CVPR 2019, equation 7).

    With r the ratio of a task's last two epoch losses, its weight is multiplied by tasks * softmax(r / temperature); by
    1 in the first two epochs.
    """

    history: Tensor

    def __init__(self, weights: tuple[float, ...]) -> None:
        super().__init__(weights)
        self.register_buffer("history", torch.zeros(2, len(weights)))  # the last two epochs' losses; 0 = none

    def forward(self, losses: Tensor) -> Tensor:
        return super().forward(self.factors() * losses)

    def factors(self) -> Tensor:
        """Return float [tasks], 1 on average."""
        earlier, last = self.history
        ratios = torch.where((earlier > 0) & (last > 0), last / earlier, 1.0)
        return len(ratios) * torch.softmax(ratios / DWA_TEMPERATURE, dim=0)

    def epoch_ended(self, losses: Tensor) -> None:
        self.history = torch.stack([self.history[1], losses.to(self.history)])


WEIGHTINGS: dict[WeightingName, type[FixedWeights]] = {
    "fixed": FixedWeights,
    "uncertainty": UncertaintyWeights,
    "dwa": DynamicWeightAverage,
}


def make_weighting(name: WeightingName, weights: tuple[float, ...]) -> FixedWeights:
    """Return the weighting of that name. weights: one per task. Its state_dict is all that an exact resume needs."""
    return WEIGHTINGS[name](weights)
