"""A whole HSTU encoder on packed rows for inference: three or four launches a layer, the time buckets once a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.fp8 import Fp8Scales, Fp8Weights
from kernels.fused_attention_layernorm.gate_projection import project_gated
from kernels.fused_attention_layernorm.launch import attend, attend_last
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.fused_attention_layernorm.projection import folded, project_in, project_in_fp8, row_moments
from kernels.fused_attention_layernorm.validation import check_encoder, check_length


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights as the kernels read them; half-precision products, float32 around them.

    in_weight: [2 * heads * (d_qk + d_v), width], rows of u, q, v, k; the norm before is folded in, see `folded`
    out_weight: [width, heads * d_v]; gain, shift: [heads * d_v] of the norm after attention
    position_bias: [heads, max_events]; time_bias: [heads, buckets]
    fp8: what Q, K and V in FP8 are multiplied by; None without
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
    fp8: Fp8Weights | None = None

    @classmethod
    def of(cls, norm_in: torch.nn.LayerNorm, project_in: torch.nn.Linear, norm_out: torch.nn.LayerNorm,
           project_out: torch.nn.Linear, position_bias: Tensor, time_bias: Tensor,
           dtype: torch.dtype, fp8: bool = False) -> "LayerWeights":  # fmt: skip
        """`norm_in` to `project_out`: a layer's modules; dtype: of the products; fp8: attention's Q, K and V."""
        in_weight, in_sums, in_bias = folded(
            project_in.weight, project_in.bias, norm_in.weight, norm_in.bias, dtype
        )  # fmt: skip
        rest = (norm_out.weight, norm_out.bias, project_out.bias, position_bias, time_bias)
        gain, shift, out_bias, position, time = (part.detach().float().contiguous() for part in rest)
        out_weight = project_out.weight.detach().to(dtype).contiguous()
        narrow = Fp8Weights.of(in_weight, in_bias, len(gain)) if fp8 else None
        return cls(in_weight, in_sums, in_bias, gain, shift, out_weight, out_bias, position, time, narrow)


@dataclass(frozen=True, slots=True)
class KernelEncoder:
    """Layers of one shape, all with FP8 or none. `max_events`: the constant N."""

    layers: list[LayerWeights]
    heads: int
    d_qk: int
    d_v: int
    max_events: int
    eps: float

    def __call__(self, x: Tensor, plan: AttentionPlan, last: bool = False) -> Tensor:
        """x: [total, width] -> states [total, width]; with `last` those of each user's newest row, [users, width].

        Raises ValueError that names the argument, its shape, and what was expected."""
        check_length(plan.max_length, self.max_events)
        weight, total, device = self.layers[0].in_weight, len(plan.seconds), plan.seconds.device
        check_encoder(x, weight.shape[1], weight.dtype, total, device, plan.kernels)
        x = x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
        moments = row_moments(x)
        whole = self.layers[:-1] if last else self.layers
        for layer in whole:
            x, moments = self._layer(layer, x, moments, plan)
        return self._last_layer(self.layers[-1], x, moments, plan) if last else x

    def _layer(self, layer: LayerWeights, x: Tensor, moments: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        u, (q, v, k) = self._project(layer, x, moments, slice(None), self._sizes)
        attended, moments = attend(
            self._by_head(q), self._by_head(k), self._by_head(v), plan.offsets, plan.targets, plan.items, plan.buckets,
            layer.position_bias, layer.time_bias, *self._factors(layer), plan.contextual, plan.launch,
        )  # fmt: skip
        return self._project_out(layer, attended, moments, u, x)

    def _last_layer(self, layer: LayerWeights, x: Tensor, moments: Tensor, plan: AttentionPlan) -> Tensor:
        """Keys and values of all rows, all else of the newest."""
        cut = self.heads * (self.d_qk + self.d_v)
        newest = (plan.offsets[1:] - 1).clamp(min=0).long()
        x_newest, moments_newest = x.index_select(0, newest), moments.index_select(0, newest)
        u, (q,) = self._project(layer, x_newest, moments_newest, slice(cut), self._sizes[:2])
        _, (v, k) = self._project(layer, x, moments, slice(cut, None), [0, *self._sizes[2:]])
        attended, moments = attend_last(
            self._by_head(q), self._by_head(k), self._by_head(v), plan.seconds, plan.offsets, plan.thresholds,
            layer.position_bias, layer.time_bias, *self._factors(layer),
        )  # fmt: skip
        return self._project_out(layer, attended, moments, u, x_newest)[0]

    def _project(self, layer: LayerWeights, x: Tensor, moments: Tensor, at: slice,
                 sizes: list[int]) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Of the weight's rows `at` the gate, of sizes[0] columns, and the other parts."""
        weights = (layer.in_weight[at], layer.in_sums[at], layer.in_bias[at])
        if layer.fp8 is None:
            u, *parts = project_in(x, moments, *weights, self.eps).split(sizes, dim=1)
            return u, tuple(parts)
        u, narrow = project_in_fp8(x, moments, *weights, layer.fp8.factors[at], sizes[0], self.eps)
        return u, narrow.split(sizes[1:], dim=1)

    def _project_out(
        self, layer: LayerWeights, attended: Tensor, moments: Tensor, u: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = (layer.gain, layer.shift, layer.out_weight, layer.out_bias)
        return project_gated(attended, moments, u, *weights, x, self.eps)

    def _factors(self, layer: LayerWeights) -> tuple[float, float]:
        """Of the scores, and of the result."""
        scales = layer.fp8.scales if layer.fp8 else Fp8Scales()
        return scales.q * scales.k, scales.v / self.max_events

    def narrowed(self, dtype: torch.dtype) -> torch.dtype:
        """What a plan of rows of `dtype` is made for: the type of q, k and v."""
        return FP8 if self.layers[0].fp8 else dtype

    @property
    def _sizes(self) -> list[int]:
        return [self.heads * d for d in (self.d_v, self.d_qk, self.d_v, self.d_qk)]

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))
