"""Y = U * LayerNorm(O) over all heads, from the moments that the attention kernel left; and its backward pass."""

import triton
import triton.language as tl


@triton.jit
def normalisation(moments, row, valid, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and reciprocal deviation of rows [n], from float32 moments [rows, HEADS, 2]: sums and sums of squares."""
    total, squares = tl.zeros_like(row).to(tl.float32), tl.zeros_like(row).to(tl.float32)
    for head in tl.static_range(HEADS):  # all loads at once, not one after the other
        total += tl.load(moments + (row * HEADS + head) * 2, mask=valid, other=0.0)
        squares += tl.load(moments + (row * HEADS + head) * 2 + 1, mask=valid, other=0.0)
    mean = total / WIDTH
    return mean, tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)


@triton.jit
def gate_kernel(
    attended, moments, u, weight, bias, out, rows, u_stride, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (rows / GROUP). attended, out: [rows, WIDTH]; u: [rows, WIDTH] of row stride `u_stride`."""
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    column = tl.arange(0, BLOCK)
    mean, scale = normalisation(moments, row, row < rows, eps, HEADS, WIDTH)  # type: ignore[misc]  # Triton's call
    kept = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    value = tl.load(attended + at, mask=kept, other=0.0).to(tl.float32)
    gate = tl.load(u + row[:, None] * u_stride + column[None, :], mask=kept, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = (value - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(out + at, (normed * gate).to(out.dtype.element_ty), mask=kept)


@triton.jit
def gate_backward_kernel(
    grad, attended, moments, u, weight, bias, grad_attended, grad_u, partial, rows, u_stride, eps, scale_below,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program takes every n-th group of rows.

    grad_attended: times `scale_below`; partial: float32 [programs, 2, WIDTH], its sums of the gradients of weight and
    bias.
    """
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    grad_gain, grad_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(rows, GROUP), tl.num_programs(0)):
        row = (group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
        kept = (row < rows)[:, None] & inside[None, :]
        mean, scale = normalisation(moments, row, row < rows, eps, HEADS, WIDTH)
        at = row[:, None] * WIDTH + column[None, :]
        above = tl.load(grad + at, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(attended + at, mask=kept, other=0.0).to(tl.float32)
        gate = tl.load(u + row[:, None] * u_stride + column[None, :], mask=kept, other=0.0).to(tl.float32)
        normed = tl.where(kept, (value - mean[:, None]) * scale[:, None], 0.0)
        tl.store(grad_u + at, (above * (normed * gain + shift)).to(grad_u.dtype.element_ty), mask=kept)
        grad_gain += tl.sum(above * gate * normed, 0)
        grad_shift += tl.sum(above * gate, 0)
        inner = above * gate * gain
        along = tl.sum(inner * normed, 1)[:, None] / WIDTH
        below = (inner - tl.sum(inner, 1)[:, None] / WIDTH - normed * along) * (scale[:, None] * scale_below)
        tl.store(grad_attended + at, below.to(grad_attended.dtype.element_ty), mask=kept)
    place = partial + tl.program_id(0) * 2 * WIDTH + column
    tl.store(place, grad_gain, mask=inside)
    tl.store(place + WIDTH, grad_shift, mask=inside)
