"""The public call: checked, on any device, known to autograd, torch.compile, torch.export and CUDA graphs.

On a GPU the kernels run; elsewhere, and for heads of odd widths, the reference does, on padded rows.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.fused_attention_layernorm import validation
from kernels.fused_attention_layernorm.backward import attention_backward
from kernels.fused_attention_layernorm.dropout import weight_of
from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.fp8 import Fp8Scales
from kernels.fused_attention_layernorm.launch import (
    KernelConfig,
    attend,
    attend_last,
    between,
    fits,
    gate_backward,
    normalise_and_gate,
)
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.fused_attention_layernorm.reference import fused_attention_layernorm as reference


def fused_attention_layernorm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    plan: AttentionPlan,
    eps: float,
    max_events: int,
    alpha: float = 1.0,
    *,
    scales: Fp8Scales | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    last: bool = False,
    debug: bool = False,
) -> Tensor:
    """U * LayerNorm(SiLU(alpha Q K^T + biases) V / N) of packed rows: [rows, heads * d_v] in u's dtype.

    q, k: [total, heads, d_qk]; v, u: [total, heads, d_v]; all float32, bfloat16 or float16; sums are float32.
    For inference q, k, v may be float8_e4m3fn, times their `scales`, beside a u of bfloat16 or float16.
    position_bias: float32 [heads, max_events]; time_bias: float32 [heads, thresholds + 1]; norm_weight, norm_bias:
    float32 [heads * d_v]. max_events: the constant N. plan: of the batch, see Plan.of; one serves all layers, its
    max_length at most max_events.
    dropout: the share of attention weights to leave out, the others count for them; seed: int64 [] on the device, or an
    int, decides which. Equal seeds leave out the same ones: draw one for each layer and step.
    last: only each user's newest row, for inference; q and u are [users, heads, d] then.
    debug: look for NaN and infinity first, which waits for the device.

    Gradients reach all tensors. No sum is atomic: equal inputs give equal bits.
    Raises ValueError that names the argument, its shape, and what was expected.
    The specification is reference.py: equations 2 and 3 of arxiv.org/abs/2402.17152.
    """
    total, device = len(plan.seconds), plan.seconds.device
    weights = (position_bias, time_bias, norm_weight, norm_bias)
    validation.check_rows(q, k, v, u, total, len(plan.offsets) - 1 if last else total, device)
    validation.check_tables(q.shape[1], v.shape[2], max_events, len(plan.thresholds) + 1, *weights, device)
    validation.check_length(plan.max_length, max_events)
    validation.check_numbers(eps, alpha)
    validation.check_fp8(q, scales, k, v, u, *weights)
    scales = scales or Fp8Scales()
    seed = validation.seed_of(dropout, seed, device)
    weights = (position_bias.contiguous(), time_bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous())
    if debug:
        tables = {"position_bias": position_bias, "time_bias": time_bias}
        validation.check_finite(q=q, k=k, v=v, u=u, **tables, norm_weight=norm_weight, norm_bias=norm_bias)
    kernels = plan.kernels and known(q) and known(v)
    kernels = kernels and fits(plan.launch, max(q.shape[2], v.shape[2]), q.element_size(), device)
    batch = (plan.seconds, plan.offsets, plan.thresholds)
    numbers = (eps, max_events, alpha * scales.q * scales.k, scales.v)
    if last:
        validation.check_last(plan.targets, plan.contextual, dropout)
        return attention_last(q, k, v, u, *weights, *batch, *numbers, kernels)
    if not kernels and torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, u, *weights)):
        return packed_reference(q, k, v, u, *weights, *batch, plan.targets, seed, *numbers, dropout, plan.contextual)
    launch = [plan.launch.rows, plan.launch.columns, plan.launch.stages, plan.launch.registers]
    prepared = (plan.targets, plan.items, plan.buckets, seed)
    whole = (*batch, *prepared, *numbers, dropout, plan.contextual, plan.max_length, launch)
    return attention(q, k, v, u, *weights, *whole, kernels)[0]


@torch.library.custom_op("millrace::attention_layernorm", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, position_bias: Tensor, time_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, seconds: Tensor, offsets: Tensor, thresholds: Tensor, targets: Tensor | None, items: Tensor,
    buckets: Tensor, seed: Tensor | None, eps: float, max_events: int, alpha: float, scale: float, dropout: float,
    contextual: int, max_length: int, launch: list[int], kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> Y [total, width]; for the backward pass, from the kernels, A V / N [total, width] and its moments."""
    weights = (position_bias, time_bias, norm_weight, norm_bias)
    if not kernels:
        batch = (seconds, offsets, thresholds, targets, seed)
        numbers = (eps, max_events, alpha, scale, dropout, contextual)
        return packed_reference(q, k, v, u, *weights, *batch, *numbers), u.new_empty(0), u.new_empty(0)
    attended, moments = attend(
        ready(q), ready(k), ready(v), offsets, targets, items, buckets, position_bias, time_bias, alpha,
        scale / max_events, contextual, KernelConfig(*launch), seed, dropout,
    )  # fmt: skip
    return normalise_and_gate(attended, moments, ready(u).flatten(1), norm_weight, norm_bias, eps), attended, moments


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = u.new_empty((u.shape[0], u.shape[1] * u.shape[2]))
    if not rest[-1]:
        return y, u.new_empty(0), u.new_empty(0)
    return y, torch.empty_like(y, dtype=between(q.dtype)), u.new_empty((*u.shape[:2], 2), dtype=torch.float32)


@torch.library.custom_op("millrace::attention_layernorm_backward", mutates_args=())
def attention_gradients(
    grad: Tensor, attended: Tensor, moments: Tensor, q: Tensor, k: Tensor, v: Tensor, u: Tensor, position_bias: Tensor,
    time_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, offsets: Tensor, targets: Tensor | None, items: Tensor,
    buckets: Tensor, seed: Tensor | None, eps: float, max_events: int, alpha: float, dropout: float, contextual: int,
    max_length: int, rows: int, columns: int,
) -> list[Tensor]:  # fmt: skip
    """-> the gradients of q, k, v, u, both bias tables, and the norm's weight and bias."""
    below, grad_u, grad_weight, grad_bias = gate_backward(
        grad.contiguous(), attended, moments, ready(u).flatten(1), norm_weight, norm_bias, eps,
        weight_of(dropout) / max_events,
    )  # fmt: skip
    grad_q, grad_k, grad_v, grad_position, grad_time = attention_backward(
        below, ready(q), ready(k), ready(v), offsets, targets, items, buckets, position_bias, time_bias, seed, alpha,
        dropout, contextual, max_length, rows, columns,
    )  # fmt: skip
    return [grad_q, grad_k, grad_v, grad_u.view(u.shape), grad_position, grad_time, grad_weight, grad_bias]


@attention_gradients.register_fake
def _(grad: Tensor, attended: Tensor, moments: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in rest[:8]]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    offsets, prepared = inputs[9], inputs[11:15]  # targets, items, buckets, seed
    ctx.save_for_backward(*inputs[:8], offsets, *prepared, *output[1:])
    ctx.numbers, ctx.tile = inputs[15:18] + inputs[19:22], inputs[22][:2]  # `scale` is FP8's: never here


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    *inputs, attended, moments = ctx.saved_tensors
    grads = attention_gradients(grad, attended, moments, *inputs, *ctx.numbers, *ctx.tile)
    return *grads, *(None,) * 16


attention.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("millrace::attention_layernorm_last", mutates_args=())
def attention_last(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, position_bias: Tensor, time_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, seconds: Tensor, offsets: Tensor, thresholds: Tensor, eps: float, max_events: int, alpha: float,
    scale: float, kernels: bool,
) -> Tensor:  # fmt: skip
    """-> Y [users, width] of each user's newest row; of a user without rows, as if all were hidden."""
    if kernels:
        rows = (ready(q), ready(k), ready(v), seconds, offsets, thresholds)
        attended, moments = attend_last(*rows, position_bias, time_bias, alpha, scale / max_events)
        return normalise_and_gate(attended, moments, ready(u).flatten(1), norm_weight, norm_bias, eps)
    newest, some = offsets[1:].long() - 1, offsets.diff() > 0
    spread = [torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=u.dtype)]
    for whole, part in zip(spread, (q, u), strict=True):  # only the newest rows' queries and gates matter
        whole[newest[some]] = part[some].to(whole.dtype)
    weights, batch = (position_bias, time_bias, norm_weight, norm_bias), (seconds, offsets, thresholds, None, None)
    y = packed_reference(spread[0], k, v, spread[1], *weights, *batch, eps, max_events, alpha, scale, 0.0, 0)
    hidden = (norm_bias * u.flatten(1)).to(u.dtype)
    return hidden if not len(y) else torch.where(some[:, None], y[newest.clamp(min=0)], hidden)


@attention_last.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty((u.shape[0], u.shape[1] * u.shape[2]))


def known(x: Tensor) -> bool:
    """Whether the kernels do with heads of x's width; a product of FP8 goes over 32 values at least."""
    return x.shape[2] in validation.WIDTHS and (x.dtype != FP8 or x.shape[2] >= 32)


def ready(x: Tensor) -> Tensor:
    """[rows, heads, d] as the copy engine reads it: the heads of a row side by side, rows at 16-byte steps."""
    together = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if together and aligned else x.clone(memory_format=torch.contiguous_format)


def packed_reference(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, position_bias: Tensor, time_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, seconds: Tensor, offsets: Tensor, thresholds: Tensor, targets: Tensor | None,
    seed: Tensor | None, eps: float, max_events: int, alpha: float, scale: float, dropout: float,
    contextual: int,
) -> Tensor:  # fmt: skip
    """The reference on packed rows: padded, in float32, packed again."""
    lengths = offsets.diff().long()
    slots = torch.arange(int(lengths.max()) if len(lengths) else 0, device=q.device)
    own = slots < lengths[:, None]  # [users, length]
    rows = torch.where(own, offsets[:-1].long()[:, None] + slots, 0)
    if not own.any():
        return torch.zeros_like(u).flatten(1)
    y = reference(
        q[rows].float(), k[rows].float(), v[rows].float() * scale, u[rows].float(), seconds[rows].long(), lengths,
        position_bias, time_bias, thresholds, norm_weight, norm_bias, eps, max_events, alpha, contextual, targets,
        dropout, seed,
    )  # fmt: skip
    return y[own].to(u.dtype)
