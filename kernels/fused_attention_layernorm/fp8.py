"""Q, K and V in FP8 (e4m3: three bits of mantissa, up to 448), for inference: what they are multiplied by.

A part of a layer has one scale, made from its weights alone: no batch is looked at. U, V, Q, K are SiLU(z) of
z = LayerNorm(x) W^T + b. A normalised row of n values has norm sqrt(n) at most, so z is at most sqrt(n) |w| + b
(Cauchy-Schwarz), and SiLU(z) lies between -0.28 and z: nothing can overflow. The bound is loose by sqrt(n) for a usual
row, 23 of 512 values, and that costs nothing: a floating-point number 23 times below the largest keeps its three bits,
and so does one 30,000 times below.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
LEAST_SILU = 0.2785  # SiLU's minimum is -0.27846


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """What Q, K and V are, over what their FP8 values hold."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0


def scale_of(weight: Tensor, bias: Tensor) -> float:
    """weight [n, width], the norm's gain folded in, bias [n] -> the largest |SiLU(...)| there can be, over LARGEST."""
    largest = (weight.float().norm(dim=1) * weight.shape[1] ** 0.5 + bias.float()).max()
    return max(float(largest), LEAST_SILU) / LARGEST


@dataclass(frozen=True, slots=True)
class Fp8Weights:
    """Of a layer. factors: float32, of its weight's rows, what their results are multiplied by to become FP8."""

    scales: Fp8Scales
    factors: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, gates: int) -> "Fp8Weights":
        """weight, bias: of u, q, v and k, the norm folded in; gates: how many rows are u's, and v's."""
        rest = len(weight) // 2 - gates
        sizes = [gates, rest, gates, rest]
        parts = list(zip(weight.split(sizes), bias.split(sizes), strict=True))
        q, v, k = (scale_of(*part) for part in parts[1:])
        factors = torch.tensor([1.0, 1 / q, 1 / v, 1 / k]).repeat_interleave(torch.tensor(sizes))
        return cls(Fp8Scales(q, k, v), factors.to(weight.device))
