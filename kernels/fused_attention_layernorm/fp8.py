"""Scales of Q, K and V in FP8 (e4m3: three bits of mantissa, up to 448), for inference.

Each of the three has one scale per layer, computed from the weights alone, not from a batch. U, V, Q, K are SiLU(z) of
z = LayerNorm(x) W^T + b. A normalised row of n values has norm sqrt(n) at most, so z is at most sqrt(n) |w| + b
(Cauchy-Schwarz), and SiLU(z) lies between -0.28 and z: nothing can overflow. For a typical row the bound is loose by
sqrt(n), 23 for 512 values. That costs nothing: a floating-point number 23 times below the largest keeps its three bits,
and so does one 30,000 times below.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
ABS_SILU_MIN = 0.2785  # SiLU's minimum is -0.27846


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """Factors from FP8 values to Q, K and V."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0


def compute_scale(weight: Tensor, bias: Tensor) -> float:
    """Return the bound of |SiLU(...)| over FP8_MAX. weight: [n, width] with the norm's gain folded in; bias: [n]."""
    bound = (weight.float().norm(dim=1) * weight.shape[1] ** 0.5 + bias.float()).max()
    return max(float(bound), ABS_SILU_MIN) / FP8_MAX


@dataclass(frozen=True, slots=True)
class Fp8Weights:
    """One layer's scales. factors: float32 [rows of its weight], by which results are multiplied to fit FP8."""

    scales: Fp8Scales
    factors: Tensor

    @classmethod
    def from_weights(cls, weight: Tensor, bias: Tensor, v_rows: int) -> "Fp8Weights":
        """Derive the scales from the rows of u, q, v and k with the norm folded in. v_rows: rows of v, and of u."""
        qk_rows = len(weight) // 2 - v_rows
        sizes = [v_rows, qk_rows, v_rows, qk_rows]
        parts = list(zip(weight.split(sizes), bias.split(sizes), strict=True))
        q, v, k = (compute_scale(*part) for part in parts[1:])
        factors = torch.tensor([1.0, 1 / q, 1 / v, 1 / k]).repeat_interleave(torch.tensor(sizes))
        return cls(Fp8Scales(q, k, v), factors.to(weight.device))
