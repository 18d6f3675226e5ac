"""A whole HSTU encoder on packed rows for inference: four launches a layer, the time buckets once a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm.batch import Plan
from kernels.fused_attention_layernorm.launch import attend, attend_last, normalise_and_gate
from kernels.fused_attention_layernorm.projection import folded, project_in, project_out, row_moments


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights as the kernels read them; half-precision products, float32 around them.

    in_weight: [2 * heads * (d_qk + d_v), width], rows of u, q, v, k; the norm before is folded in, see `folded`
    out_weight: [width, heads * d_v]; gain, shift: [heads * d_v] of the norm after attention
    position_bias: [heads, max_events]; time_bias: [heads, buckets]
    """

    in_weight: Tensor
    in_sums: Tensor
    in_bias: Tensor
    gain: Tensor
    shift: Tensor
    out_weight: Tensor
    out_bias: Tensor
    position_bias: Tensor
    time_bias: Tensor

    @classmethod
    def of(cls, norm_in: torch.nn.LayerNorm, project_in: torch.nn.Linear, norm_out: torch.nn.LayerNorm,
           project_out: torch.nn.Linear, position_bias: Tensor, time_bias: Tensor,
           dtype: torch.dtype) -> "LayerWeights":  # fmt: skip
        """`norm_in` to `project_out`: a layer's modules; dtype: of the products."""
        in_weight, in_sums, in_bias = folded(
            project_in.weight, project_in.bias, norm_in.weight, norm_in.bias, dtype
        )  # fmt: skip
        rest = (norm_out.weight, norm_out.bias, project_out.bias, position_bias, time_bias)
        gain, shift, out_bias, position, time = (part.detach().float().contiguous() for part in rest)
        out_weight = project_out.weight.detach().to(dtype).contiguous()
        return cls(in_weight, in_sums, in_bias, gain, shift, out_weight, out_bias, position, time)


@dataclass(frozen=True, slots=True)
class Encoder:
    """Layers of one shape. `max_events`: the constant N."""

    layers: list[LayerWeights]
    heads: int
    d_qk: int
    d_v: int
    max_events: int
    eps: float

    def __call__(self, x: Tensor, plan: Plan, last: bool = False) -> Tensor:
        """x: [total, width] -> states [total, width]; with `last` those of each user's newest row, [users, width]."""
        moments = row_moments(x)
        whole = self.layers[:-1] if last else self.layers
        for layer in whole:
            x, moments = self._layer(layer, x, moments, plan)
        return self._last_layer(self.layers[-1], x, moments, plan) if last else x

    def _layer(self, layer: LayerWeights, x: Tensor, moments: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        projected = project_in(x, moments, layer.in_weight, layer.in_sums, layer.in_bias, self.eps)
        u, q, v, k = projected.split(self._sizes, dim=1)
        attended, moments = attend(
            self._by_head(q), self._by_head(k), self._by_head(v), plan.offsets, plan.targets, plan.items, plan.buckets,
            layer.position_bias, layer.time_bias, 1.0, 1.0 / self.max_events, plan.contextual, plan.launch,
        )  # fmt: skip
        y = normalise_and_gate(attended, moments, u, layer.gain, layer.shift, self.eps)
        return project_out(y, layer.out_weight, layer.out_bias, x)

    def _last_layer(self, layer: LayerWeights, x: Tensor, moments: Tensor, plan: Plan) -> Tensor:
        """Keys and values of all rows, all else of the newest."""
        cut = self.heads * (self.d_qk + self.d_v)
        newest = (plan.offsets[1:] - 1).clamp(min=0).long()
        parts = [(layer.in_weight[at], layer.in_sums[at], layer.in_bias[at]) for at in (slice(cut), slice(cut, None))]
        x_newest = x.index_select(0, newest)
        u, q = project_in(x_newest, moments.index_select(0, newest), *parts[0], self.eps).split(self._sizes[:2], dim=1)
        v, k = project_in(x, moments, *parts[1], self.eps).split(self._sizes[2:], dim=1)
        attended, moments = attend_last(
            self._by_head(q), self._by_head(k), self._by_head(v), plan.seconds, plan.offsets, plan.thresholds,
            layer.position_bias, layer.time_bias, 1.0, 1.0 / self.max_events,
        )  # fmt: skip
        y = normalise_and_gate(attended, moments, u, layer.gain, layer.shift, self.eps)
        return project_out(y, layer.out_weight, layer.out_bias, x_newest)[0]

    @property
    def _sizes(self) -> list[int]:
        return [self.heads * d for d in (self.d_v, self.d_qk, self.d_v, self.d_qk)]

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))
