"""The public call: checked, on any device, supported by autograd, torch.compile, torch.export and CUDA graphs.

On a GPU the kernels run; elsewhere, and for unsupported head widths, the reference runs on a few padded users at a
time.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.fused_attention_layernorm import validation
from kernels.fused_attention_layernorm.backward import attention_backward
from kernels.fused_attention_layernorm.dropout import keep_scale
from kernels.fused_attention_layernorm.fallback import packed_reference
from kernels.fused_attention_layernorm.gate_norm import gate_backward, normalise_and_gate
from kernels.fused_attention_layernorm.launch import KernelConfig, attend, attend_last, attn_out_dtype, fits
from kernels.fused_attention_layernorm.plan import AttentionPlan


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
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    last: bool = False,
    debug: bool = False,
) -> Tensor:
    """Return U * LayerNorm(SiLU(alpha Q K^T + biases) V / N) of packed rows: [rows, heads * d_v] in u's dtype.

    q, k: [total, heads, d_qk]; v, u: [total, heads, d_v]; all float32, bfloat16 or float16; sums are float32.
    position_bias: float32 [heads, max_events]; time_bias: float32 [heads, thresholds + 1]; norm_weight, norm_bias:
    float32 [heads * d_v]. max_events: the constant N. plan: of the batch, see AttentionPlan.from_batch; all layers
    share it; its max_length is at most max_events.
    dropout: fraction of the attention weights to drop; the rest is scaled up. seed: int64 [] on the device, or an int,
    decides which. Equal seeds drop the same weights: draw a new seed per layer and step.
    last: compute only each user's last row, for inference; q and u are then [users, heads, d].
    debug: check for NaN and infinity first, which waits for the device.

    Gradients reach all tensors. No sum is atomic: equal inputs give equal bits.
    Raises ValueError that names the argument, its shape, and what was expected.
    The specification is reference.py: equations 2 and 3 of arxiv.org/abs/2402.17152.
    """
    tables = (position_bias, time_bias, norm_weight, norm_bias)
    _check_shapes(q, k, v, u, tables, plan, max_events, last)
    validation.check_numbers(eps, alpha)
    seed = validation.resolve_seed(dropout, seed, plan.seconds.device)
    tables = (position_bias.contiguous(), time_bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous())
    if debug:
        biases = {"position_bias": position_bias, "time_bias": time_bias}
        validation.check_finite(q=q, k=k, v=v, u=u, **biases, norm_weight=norm_weight, norm_bias=norm_bias)
    kernels = plan.kernels and has_kernel(q) and has_kernel(v)
    kernels = kernels and fits(plan.config, max(q.shape[2], v.shape[2]), q.element_size(), q.device)
    batch = (plan.seconds, plan.offsets, plan.thresholds)
    numbers = (eps, max_events, alpha)
    if last:
        validation.check_last(plan.num_contextual, dropout)
        return attention_last(q, k, v, u, *tables, *batch, *numbers, kernels)
    if not kernels and torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, u, *tables)):
        # The custom operator has gradients of the kernels only; torch differentiates the reference.
        return packed_reference(q, k, v, u, *tables, *batch, seed, *numbers, dropout, plan.num_contextual)
    config = [plan.config.block_m, plan.config.block_n, plan.config.stages, plan.config.max_registers]
    prepared = (plan.row_blocks, plan.time_buckets, seed)
    options = (dropout, plan.num_contextual, plan.max_length, config, kernels)
    return attention(q, k, v, u, *tables, *batch, *prepared, *numbers, *options)[0]


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    plan: AttentionPlan,
    max_events: int,
    last: bool,
) -> None:
    total = len(plan.seconds)
    queries = len(plan.offsets) - 1 if last else total
    device = plan.seconds.device
    validation.check_rows(q, k, v, u, total, queries, device)
    validation.check_tables(q.shape[1], v.shape[2], max_events, len(plan.thresholds) + 1, *tables, device)
    validation.check_length(plan.max_length, max_events)


@torch.library.custom_op("millrace::attention_layernorm", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    row_blocks: Tensor,
    time_buckets: Tensor,
    seed: Tensor | None,
    eps: float,
    max_events: int,
    alpha: float,
    dropout: float,
    num_contextual: int,
    max_length: int,
    config: list[int],
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Y [total, width]; from the kernels also A V / N [total, width] and its row statistics, for gradients."""
    tables = (position_bias, time_bias, norm_weight, norm_bias)
    if not kernels:
        batch = (seconds, offsets, thresholds, seed)
        numbers = (eps, max_events, alpha, dropout, num_contextual)
        return packed_reference(q, k, v, u, *tables, *batch, *numbers), u.new_empty(0), u.new_empty(0)
    attn_out, row_stats = attend(
        align_rows(q),
        align_rows(k),
        align_rows(v),
        offsets,
        row_blocks,
        time_buckets,
        position_bias,
        time_bias,
        alpha,
        1.0 / max_events,
        num_contextual,
        KernelConfig(*config),
        seed,
        dropout,
    )
    y = normalise_and_gate(attn_out, row_stats, align_rows(u).flatten(1), norm_weight, norm_bias, eps)
    return y, attn_out, row_stats


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = u.new_empty((u.shape[0], u.shape[1] * u.shape[2]))
    if not rest[-1]:
        return y, u.new_empty(0), u.new_empty(0)
    attn_out = torch.empty_like(y, dtype=attn_out_dtype(q.dtype))
    return y, attn_out, u.new_empty((*u.shape[:2], 2), dtype=torch.float32)


@torch.library.custom_op("millrace::attention_layernorm_backward", mutates_args=())
def attention_gradients(
    grad: Tensor,
    attn_out: Tensor,
    row_stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    offsets: Tensor,
    row_blocks: Tensor,
    time_buckets: Tensor,
    seed: Tensor | None,
    eps: float,
    max_events: int,
    alpha: float,
    dropout: float,
    num_contextual: int,
    max_length: int,
    block_m: int,
    block_n: int,
) -> list[Tensor]:
    """Return the gradients of q, k, v, u, both bias tables, and the norm's weight and bias."""
    scale = keep_scale(dropout) / max_events
    grad_attn, grad_u, grad_weight, grad_bias = gate_backward(
        grad.contiguous(), attn_out, row_stats, align_rows(u).flatten(1), norm_weight, norm_bias, eps, scale
    )
    grad_q, grad_k, grad_v, grad_position, grad_time = attention_backward(
        grad_attn,
        align_rows(q),
        align_rows(k),
        align_rows(v),
        offsets,
        row_blocks,
        time_buckets,
        position_bias,
        time_bias,
        seed,
        alpha,
        dropout,
        num_contextual,
        max_length,
        block_m,
        block_n,
    )
    return [grad_q, grad_k, grad_v, grad_u.view(u.shape), grad_position, grad_time, grad_weight, grad_bias]


@attention_gradients.register_fake
def _(grad: Tensor, attn_out: Tensor, row_stats: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in rest[:8]]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    offsets = inputs[9]
    prepared = inputs[11:14]  # row_blocks, time_buckets, seed
    ctx.save_for_backward(*inputs[:8], offsets, *prepared, *output[1:])
    ctx.numbers = inputs[14:20]
    ctx.tile = inputs[20][:2]


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    *inputs, attn_out, row_stats = ctx.saved_tensors
    grads = attention_gradients(grad, attn_out, row_stats, *inputs, *ctx.numbers, *ctx.tile)
    return *grads, *(None,) * 14


attention.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("millrace::attention_layernorm_last", mutates_args=())
def attention_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    eps: float,
    max_events: int,
    alpha: float,
    kernels: bool,
) -> Tensor:
    """Return Y [users, width] of each user's last row; of a user without rows, as if all were masked."""
    if kernels:
        rows = (align_rows(q), align_rows(k), align_rows(v), seconds, offsets, thresholds)
        attn_out, row_stats = attend_last(*rows, position_bias, time_bias, alpha, 1.0 / max_events)
        return normalise_and_gate(attn_out, row_stats, align_rows(u).flatten(1), norm_weight, norm_bias, eps)
    last = offsets[1:].long() - 1
    has_rows = offsets.diff() > 0
    # Queries and gates of the other rows do not matter: they stay 0.
    all_q = torch.zeros_like(k, dtype=torch.float32)
    all_u = torch.zeros_like(v, dtype=u.dtype)
    all_q[last[has_rows]] = q[has_rows].to(all_q.dtype)
    all_u[last[has_rows]] = u[has_rows].to(all_u.dtype)
    tables = (position_bias, time_bias, norm_weight, norm_bias)
    batch = (seconds, offsets, thresholds, None)
    y = packed_reference(all_q, k, v, all_u, *tables, *batch, eps, max_events, alpha, 0.0, 0)
    masked = (norm_bias * u.flatten(1)).to(u.dtype)
    return masked if not len(y) else torch.where(has_rows[:, None], y[last.clamp(min=0)], masked)


@attention_last.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty((u.shape[0], u.shape[1] * u.shape[2]))


def align_rows(x: Tensor) -> Tensor:
    """Return [rows, heads, d] as the copy engine reads it: a row's heads contiguous, rows aligned to 16 bytes."""
    contiguous = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if contiguous and aligned else x.clone(memory_format=torch.contiguous_format)


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels support heads of x's width."""
    return x.shape[2] in validation.HEAD_WIDTHS
