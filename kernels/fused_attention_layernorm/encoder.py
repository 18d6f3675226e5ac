"""An HSTU encoder on packed rows, for inference: three or four launches per layer, time buckets once per batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm.gate_projection import project_gated
from kernels.fused_attention_layernorm.launch import attend, attend_last
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.fused_attention_layernorm.projection import compute_row_stats, fold_norm, project_in
from kernels.fused_attention_layernorm.validation import check_encoder, check_length


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights as the kernels read them; weights of products in half precision, the others in float32.

    in_weight: [2 * heads * (d_qk + d_v), width], rows of u, q, v, k; the norm before is folded in, see `fold_norm`
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
    def from_modules(
        cls,
        norm_in: torch.nn.LayerNorm,
        project_in: torch.nn.Linear,
        norm_out: torch.nn.LayerNorm,
        project_out: torch.nn.Linear,
        position_bias: Tensor,
        time_bias: Tensor,
        dtype: torch.dtype,
    ) -> "LayerWeights":
        """Convert a layer's modules and bias tables. dtype: of the products."""
        in_weight, in_sums, in_bias = fold_norm(project_in.weight, project_in.bias, norm_in.weight, norm_in.bias, dtype)
        float_parts = (norm_out.weight, norm_out.bias, project_out.bias, position_bias, time_bias)
        gain, shift, out_bias, position, time = (part.detach().float().contiguous() for part in float_parts)
        out_weight = project_out.weight.detach().to(dtype).contiguous()
        return cls(in_weight, in_sums, in_bias, gain, shift, out_weight, out_bias, position, time)


@dataclass(frozen=True, slots=True)
class KernelEncoder:
    """Layers of one shape. `max_events`: the constant N."""

    layers: list[LayerWeights]
    heads: int
    d_qk: int
    d_v: int
    max_events: int
    eps: float

    def __call__(self, x: Tensor, plan: AttentionPlan, last: bool = False) -> Tensor:
        """Return the states [total, width] of x [total, width]; with `last` of each user's last row, [users, width].

        Raises ValueError that names the argument, its shape, and what was expected.
        """
        check_length(plan.max_length, self.max_events)
        weight = self.layers[0].in_weight
        device = plan.seconds.device
        check_encoder(x, weight.shape[1], weight.dtype, len(plan.seconds), device, plan.kernels)
        x = x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
        row_stats = compute_row_stats(x)
        full_layers = self.layers[:-1] if last else self.layers
        for layer in full_layers:
            x, row_stats = self._layer(layer, x, row_stats, plan)
        return self._last_layer(self.layers[-1], x, row_stats, plan) if last else x

    def _layer(self, layer: LayerWeights, x: Tensor, row_stats: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
        u, (q, v, k) = self._project(layer, x, row_stats, slice(None), self._part_widths)
        attn_out, attn_row_stats = attend(
            self._split_heads(q),
            self._split_heads(k),
            self._split_heads(v),
            plan.offsets,
            plan.row_blocks,
            plan.time_buckets,
            layer.position_bias,
            layer.time_bias,
            1.0,
            1.0 / self.max_events,
            plan.num_contextual,
            plan.config,
        )
        return self._project_out(layer, attn_out, attn_row_stats, u, x)

    def _last_layer(self, layer: LayerWeights, x: Tensor, row_stats: Tensor, plan: AttentionPlan) -> Tensor:
        """Compute keys and values of all rows, everything else of the last rows."""
        split = self.heads * (self.d_qk + self.d_v)  # first row of v in in_weight
        last = (plan.offsets[1:] - 1).clamp(min=0).long()
        x_last = x.index_select(0, last)
        row_stats_last = row_stats.index_select(0, last)
        u, (q,) = self._project(layer, x_last, row_stats_last, slice(split), self._part_widths[:2])
        _, (v, k) = self._project(layer, x, row_stats, slice(split, None), [0, *self._part_widths[2:]])
        attn_out, attn_row_stats = attend_last(
            self._split_heads(q),
            self._split_heads(k),
            self._split_heads(v),
            plan.seconds,
            plan.offsets,
            plan.thresholds,
            layer.position_bias,
            layer.time_bias,
            1.0,
            1.0 / self.max_events,
        )
        return self._project_out(layer, attn_out, attn_row_stats, u, x_last)[0]

    def _project(
        self, layer: LayerWeights, x: Tensor, row_stats: Tensor, rows: slice, sizes: list[int]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Project x by these rows of in_weight; return the gate, of sizes[0] columns, and the other parts."""
        weights = (layer.in_weight[rows], layer.in_sums[rows], layer.in_bias[rows])
        u, *parts = project_in(x, row_stats, *weights, self.eps).split(sizes, dim=1)
        return u, tuple(parts)

    def _project_out(
        self, layer: LayerWeights, attn_out: Tensor, attn_row_stats: Tensor, u: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = (layer.gain, layer.shift, layer.out_weight, layer.out_bias)
        return project_gated(attn_out, attn_row_stats, u, *weights, x, self.eps)

    @property
    def _part_widths(self) -> list[int]:
        return [self.heads * d for d in (self.d_v, self.d_qk, self.d_v, self.d_qk)]

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))
