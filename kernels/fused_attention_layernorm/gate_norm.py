"""Y = U * LayerNorm(O) over all heads, from the row statistics that the attention kernel left; and its backward pass.

D_ATTN is the width of O, heads * d_v; BLOCK_D the next power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.launch import ROW_TILE_VALUES, padded_width
from kernels.launch import ceil_div, launch

BACKWARD_TILE_VALUES = 2048  # values of a tile of the backward kernel
BACKWARD_PROGRAMS = 264


@triton.jit
def normalisation(row_stats, row, valid, eps, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return mean and reciprocal deviation of rows [n] of WIDTH values.

    row_stats: float32 [rows, PARTS, 2], sum and sum of squares of each part of a row.
    """
    total = tl.zeros_like(row).to(tl.float32)
    squares = tl.zeros_like(row).to(tl.float32)
    for part in tl.static_range(PARTS):  # unrolled, so that no load waits for another
        total += tl.load(row_stats + (row * PARTS + part) * 2, mask=valid, other=0.0)
        squares += tl.load(row_stats + (row * PARTS + part) * 2 + 1, mask=valid, other=0.0)
    mean = total / WIDTH
    return mean, tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)


@triton.jit
def gate_kernel(
    attn_out, row_stats, u, weight, bias, out, rows, u_stride, eps,
    HEADS: tl.constexpr, D_ATTN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write out = U * LayerNorm(attn_out). Grid (rows / BLOCK_M).

    attn_out, out: [rows, D_ATTN]; u: [rows, D_ATTN] with row stride `u_stride`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mean, scale = normalisation(row_stats, row, row < rows, eps, HEADS, D_ATTN)  # type: ignore[misc]  # Triton's call
    mask = (row < rows)[:, None] & (column < D_ATTN)[None, :]
    offset = row[:, None] * D_ATTN + column[None, :]
    value = tl.load(attn_out + offset, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(u + row[:, None] * u_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < D_ATTN, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < D_ATTN, other=0.0).to(tl.float32)
    normed = (value - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(out + offset, (normed * gate).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad, attn_out, row_stats, u, weight, bias, grad_attn, grad_u, partial_sums, rows, u_stride, eps, grad_attn_scale,
    HEADS: tl.constexpr, D_ATTN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the gradients of attn_out and u. Grid (programs): each takes every programs-th group of BLOCK_M rows.

    grad_attn: multiplied by `grad_attn_scale`; partial_sums: float32 [programs, 2, D_ATTN], each program's sums of the
    gradients of weight and bias.
    """
    column = tl.arange(0, BLOCK_D)
    inside = column < D_ATTN
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    grad_gain = tl.zeros([BLOCK_D], tl.float32)
    grad_shift = tl.zeros([BLOCK_D], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = (group * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        mean, scale = normalisation(row_stats, row, row < rows, eps, HEADS, D_ATTN)
        offset = row[:, None] * D_ATTN + column[None, :]
        grad_y = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(attn_out + offset, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(u + row[:, None] * u_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = tl.where(mask, (value - mean[:, None]) * scale[:, None], 0.0)
        tl.store(grad_u + offset, (grad_y * (normed * gain + shift)).to(grad_u.dtype.element_ty), mask=mask)
        grad_gain += tl.sum(grad_y * gate * normed, 0)
        grad_shift += tl.sum(grad_y * gate, 0)
        grad_normed = grad_y * gate * gain
        projection = tl.sum(grad_normed * normed, 1)[:, None] / D_ATTN
        grad_value = (grad_normed - tl.sum(grad_normed, 1)[:, None] / D_ATTN - normed * projection) * (
            scale[:, None] * grad_attn_scale
        )
        tl.store(grad_attn + offset, grad_value.to(grad_attn.dtype.element_ty), mask=mask)
    partial_sum = partial_sums + tl.program_id(0) * 2 * D_ATTN + column
    tl.store(partial_sum, grad_gain, mask=inside)
    tl.store(partial_sum + D_ATTN, grad_shift, mask=inside)


def normalise_and_gate(
    attn_out: Tensor, row_stats: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Return U * LayerNorm(O) [rows, width] in u's dtype. attn_out: [rows, width]; u: [rows, width], any row stride."""
    rows, width = attn_out.shape
    out = u.new_empty((rows, width))
    block_m = max(1, ROW_TILE_VALUES // padded_width(width))
    if rows:
        launch(
            gate_kernel, (ceil_div(rows, block_m),),
            attn_out, row_stats, u, weight, bias, out, rows, u.stride(0), eps,
            HEADS=row_stats.shape[1], D_ATTN=width, BLOCK_D=padded_width(width), BLOCK_M=block_m, num_warps=4,
        )  # fmt: skip
    return out


def gate_backward(
    grad: Tensor,
    attn_out: Tensor,
    row_stats: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of attn_out times `scale`, in u's dtype; of u; of weight; and of bias.

    scale: the factor that `attend` applied to A V.
    """
    rows, width = attn_out.shape
    block_m = max(1, BACKWARD_TILE_VALUES // padded_width(width))
    grad_attn = u.new_empty((rows, width))
    grad_u = u.new_empty((rows, width))
    partial_sums = u.new_zeros((BACKWARD_PROGRAMS, 2, width), dtype=torch.float32)
    if rows:
        launch(
            gate_backward_kernel, (BACKWARD_PROGRAMS,),
            grad, attn_out, row_stats, u, weight, bias, grad_attn, grad_u, partial_sums, rows, u.stride(0), eps, scale,
            HEADS=row_stats.shape[1], D_ATTN=width, BLOCK_D=padded_width(width), BLOCK_M=block_m, num_warps=4,
        )  # fmt: skip
    grad_weight, grad_bias = partial_sums.sum(0)
    return grad_attn, grad_u, grad_weight.clone(), grad_bias.clone()
