"""Attention's backward pass in Triton. Scores are recomputed, in three kernels, so that none needs atomics.

With x = alpha q k + bias, a = m SiLU(x) where m = 0 drops a weight and m = 1 keeps it, and g = the gradient of the
result, A V / (N (1 - p)), divided by N (1 - p):
    dV = A^T g,   dx = m (g V^T) * SiLU'(x),   dQ = alpha dx K,   dK = alpha dx^T Q,   dbias = sums of dx
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.dropout import keep_threshold
from kernels.fused_attention_layernorm.kernel import RANDOM_RANGE, is_visible, keep_mask, load_user_range
from kernels.fused_attention_layernorm.launch import dot_precision, or_placeholder
from kernels.fused_attention_layernorm.plan_kernels import from_fragment_order
from kernels.launch import ceil_div, launch, next_power_of_2

# Programs that share the tiles of one diagonal. With 8 of them many short users take twice as long (21.3 ms against
# 9.4, `tests.benchmarks.training_steps`, tiny in bfloat16 on an H100).
SPLITS = 64


@triton.jit
def recompute_tile(
    q_tile, k_tile, v_tile, grad_tile, row, tile, start, length, time_buckets, position_bias, time_bias, seed,
    head, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a, dx and the time bucket of [BLOCK_M, BLOCK_N] scores; a and dx are 0 where masked or dropped."""
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    visible = is_visible(row, column, length, NUM_CONTEXTUAL)
    visible = visible & (row < length)[:, None] & (column < length)[None, :]
    bucket = tl.load(time_buckets + tl.arange(0, BLOCK_M * BLOCK_N))
    bucket = from_fragment_order(bucket, BLOCK_M, BLOCK_N).to(tl.int32)
    distance = tl.maximum(row[:, None] - column[None, :], 0)
    bias = tl.load(time_bias + bucket) + tl.load(position_bias + distance, mask=visible, other=0.0)
    x = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * alpha + bias
    sigmoid = tl.sigmoid(x)
    slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    grad_weights = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
    if KEEP_THRESHOLD < RANDOM_RANGE:
        visible = visible & keep_mask(seed, start.to(tl.int32) + row, tile, head, BLOCK_N, KEEP_THRESHOLD)
    return tl.where(visible, x * sigmoid, 0.0), tl.where(visible, grad_weights * slope, 0.0), bucket


@triton.jit
def load_rows(x, row, length, stride, D: tl.constexpr):
    """Return [rows, D] of a user's rows, 0 past its length."""
    pointers = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=(row < length)[:, None], other=0.0)


@triton.jit
def grad_q_kernel(
    q, k, v, grad, grad_q, row_blocks, offsets, time_buckets, position_bias, time_bias, seed,
    q_stride, k_stride, v_stride, alpha, num_positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIME_BUCKETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_q. Grid (heads * blocks): a program loops over the tiles of one row block.

    grad: [tokens, HEADS * D_V]; grad_q: [tokens, HEADS * D_QK].
    """
    head = tl.program_id(0) % HEADS
    row_block = row_blocks + tl.program_id(0) // HEADS * 4
    user = tl.load(row_block)
    row0 = tl.load(row_block + 1)
    tile0 = tl.load(row_block + 2)
    tiles = tl.load(row_block + 3)
    if user < 0:
        return
    start, length = load_user_range(user, offsets, num_positions)  # type: ignore[misc]  # Triton's call
    start = start.to(tl.int64)
    row = row0 + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK)
    grad_tile = load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V)
    result = tl.zeros([BLOCK_M, D_QK], tl.float32)
    for tile in range(tiles):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK)
        v_tile = load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V)
        _, dx, _ = recompute_tile(
            q_tile, k_tile, v_tile, grad_tile, row, tile, start, length,
            time_buckets + (tile0 + tile).to(tl.int64) * (BLOCK_M * BLOCK_N), position_bias + head * num_positions,
            time_bias + head * TIME_BUCKETS, tl.load(seed), head, alpha, BLOCK_M, BLOCK_N, NUM_CONTEXTUAL,
            KEEP_THRESHOLD, PRECISION,
        )  # fmt: skip
        result = tl.dot(dx.to(k_tile.dtype), k_tile, result, input_precision=PRECISION)
    pointers = grad_q + (start + row)[:, None] * (HEADS * D_QK) + (head * D_QK + tl.arange(0, D_QK))[None, :]
    tl.store(pointers, (result * alpha).to(grad_q.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def grad_kv_kernel(
    q, k, v, grad, grad_k, grad_v, row_blocks, offsets, time_buckets, position_bias, time_bias, seed,
    q_stride, k_stride, v_stride, alpha, num_positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIME_BUCKETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write grad_k and grad_v. Grid (heads * blocks, BLOCK_M / BLOCK_N): a program loops over the row blocks that see
    the columns of one tile.

    A user's blocks are contiguous, the last rows first, so the block of the next rows is the entry before.
    """
    head = tl.program_id(0) % HEADS
    index = tl.program_id(0) // HEADS
    user = tl.load(row_blocks + index * 4)
    row0 = tl.load(row_blocks + index * 4 + 1)
    if user < 0:
        return
    start, length = load_user_range(user, offsets, num_positions)  # type: ignore[misc]  # Triton's call
    start = start.to(tl.int64)
    tile = row0 // BLOCK_N + tl.program_id(1)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK)
    v_tile = load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V)
    result_k = tl.zeros([BLOCK_N, D_QK], tl.float32)
    result_v = tl.zeros([BLOCK_N, D_V], tl.float32)
    first = 0 if NUM_CONTEXTUAL else row0 // BLOCK_M
    for block in range(first, tl.cdiv(length, BLOCK_M)):
        row_block = row_blocks + (index - (block - row0 // BLOCK_M)) * 4
        if tile < tl.load(row_block + 3):
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            q_tile = load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK)
            grad_tile = load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V)
            weights, dx, _ = recompute_tile(
                q_tile, k_tile, v_tile, grad_tile, row, tile, start, length,
                time_buckets + (tl.load(row_block + 2) + tile).to(tl.int64) * (BLOCK_M * BLOCK_N),
                position_bias + head * num_positions, time_bias + head * TIME_BUCKETS, tl.load(seed), head, alpha,
                BLOCK_M, BLOCK_N, NUM_CONTEXTUAL, KEEP_THRESHOLD, PRECISION,
            )  # fmt: skip
            result_v = tl.dot(tl.trans(weights.to(v_tile.dtype)), grad_tile, result_v, input_precision=PRECISION)
            result_k = tl.dot(tl.trans(dx.to(q_tile.dtype)), q_tile, result_k, input_precision=PRECISION)
    token = (start + column)[:, None]
    mask = (column < length)[:, None]
    k_pointers = grad_k + token * (HEADS * D_QK) + (head * D_QK + tl.arange(0, D_QK))[None, :]
    v_pointers = grad_v + token * (HEADS * D_V) + (head * D_V + tl.arange(0, D_V))[None, :]
    tl.store(k_pointers, (result_k * alpha).to(grad_k.dtype.element_ty), mask=mask)
    tl.store(v_pointers, result_v.to(grad_v.dtype.element_ty), mask=mask)


@triton.jit
def grad_bias_kernel(
    q, k, v, grad, position_sums, time_sums, row_blocks, num_row_blocks, offsets, time_buckets, position_bias,
    time_bias, seed, q_stride, k_stride, v_stride, alpha, num_positions, first_diagonal,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIME_BUCKETS: tl.constexpr, BLOCK_TIME: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write partial sums of both bias gradients. Grid (heads, diagonals, SPLITS): a program loops over its share of the
    tiles at one distance from the diagonal, which have their positions in common.

    position_sums: float32 [SPLITS, diagonals, HEADS, BLOCK_M * BLOCK_N], by score of the tile; time_sums: [SPLITS,
    diagonals, HEADS, TIME_BUCKETS].
    """
    head = tl.program_id(0)
    diagonal = tl.program_id(1)
    split = tl.program_id(2)
    times = tl.arange(0, BLOCK_TIME)
    tile_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    time_sum = tl.zeros([BLOCK_TIME], tl.float32)
    for index in range(split, num_row_blocks, tl.num_programs(2)):
        row_block = row_blocks + index * 4
        user = tl.load(row_block)
        row0 = tl.load(row_block + 1)
        tile0 = tl.load(row_block + 2)
        tiles = tl.load(row_block + 3)
        tile = row0 // BLOCK_N - diagonal - first_diagonal
        if (user >= 0) & (tile >= 0) & (tile < tiles):
            start, length = load_user_range(user, offsets, num_positions)  # type: ignore[misc]  # Triton's call
            start = start.to(tl.int64)
            row = row0 + tl.arange(0, BLOCK_M)
            column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            _, dx, bucket = recompute_tile(
                load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK),
                load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK),
                load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V),
                load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V),
                row, tile, start, length,
                time_buckets + (tile0 + tile).to(tl.int64) * (BLOCK_M * BLOCK_N),
                position_bias + head * num_positions, time_bias + head * TIME_BUCKETS, tl.load(seed), head, alpha,
                BLOCK_M, BLOCK_N, NUM_CONTEXTUAL, KEEP_THRESHOLD, PRECISION,
            )  # fmt: skip
            tile_sum += dx
            for time in range(tl.min(bucket), tl.max(bucket) + 1):  # far from the diagonal a tile has few buckets
                time_sum += tl.where(times == time, tl.sum(tl.where(bucket == time, dx, 0.0)), 0.0)
    part = ((split * tl.num_programs(1) + diagonal) * HEADS + head).to(tl.int64)
    cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(position_sums + part * (BLOCK_M * BLOCK_N) + cell, tile_sum)
    tl.store(time_sums + part * TIME_BUCKETS + times, time_sum, mask=times < TIME_BUCKETS)


def sum_diagonals(tiles: Tensor, first_diagonal: int, num_positions: int) -> Tensor:
    """Sum tiles [diagonals, heads, block_m, block_n] by distance: [heads, num_positions]; below 0 counts as 0.

    Row r and column c of tile d are (first_diagonal + d) * block_n + r - c apart. Reading padded rows with a stride one
    shorter than their width shifts each row by one, which aligns equal distances in columns.
    """
    diagonals, heads, block_m, block_n = tiles.shape
    width = block_m + block_n
    sheared = torch.nn.functional.pad(tiles.flip(3), (0, block_m)).flatten(2)[:, :, : block_m * (width - 1)]
    lines = sheared.unflatten(2, (block_m, width - 1)).sum(2)  # [diagonals, heads, width - 1], from r - c = 1 - block_n
    parts = torch.nn.functional.pad(lines, (0, 1)).unflatten(2, (width // block_n, block_n))
    sums = tiles.new_zeros((heads, diagonals + width // block_n - 1, block_n))
    for step in range(width // block_n):
        sums[:, step : step + diagonals] += parts[:, :, step].transpose(0, 1)
    flat = sums.flatten(1)  # index i is the distance i + 1 - block_n + first_diagonal * block_n
    zero = block_n - 1 - first_diagonal * block_n
    padding = max(0, num_positions - flat.shape[1] + zero)
    result = torch.nn.functional.pad(flat[:, zero:], (0, padding))[:, :num_positions].clone()
    result[:, 0] += flat[:, :zero].sum(1)
    return result


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_blocks: Tensor,
    time_buckets: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    seed: Tensor | None,
    alpha: float,
    dropout: float,
    num_contextual: int,
    max_length: int,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, and of the two bias tables in float32. Equal inputs give equal bits.

    grad: [total, heads * d_v] from `gate_backward`, in q's dtype; the others: see `attend`.
    """
    total, heads, d_qk = q.shape
    d_v = v.shape[2]
    grads = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (q, k, v)]
    if not total or not len(row_blocks):
        return *grads, torch.zeros_like(position_bias), torch.zeros_like(time_bias)
    column_tiles = ceil_div(max_length, block_n)
    first_diagonal = -column_tiles if num_contextual else 1 - block_m // block_n
    diagonals = column_tiles - first_diagonal
    times = time_bias.shape[1]
    position_sums = q.new_empty((SPLITS, diagonals, heads, block_m, block_n), dtype=torch.float32)
    time_sums = q.new_empty((SPLITS, diagonals, heads, times), dtype=torch.float32)
    batch = (offsets, time_buckets, position_bias, time_bias, or_placeholder(seed, offsets))
    numbers = (q.stride(0), k.stride(0), v.stride(0), alpha, position_bias.shape[1])
    options = {
        "HEADS": heads, "D_QK": d_qk, "D_V": d_v, "TIME_BUCKETS": times, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "NUM_CONTEXTUAL": num_contextual, "KEEP_THRESHOLD": keep_threshold(dropout),
        "PRECISION": dot_precision(q.dtype), "num_warps": block_m // 16, "num_stages": 1,
    }  # fmt: skip
    launch(grad_q_kernel, (heads * len(row_blocks),), q, k, v, grad, grads[0], row_blocks, *batch, *numbers, **options)
    launch(
        grad_kv_kernel, (heads * len(row_blocks), block_m // block_n),
        q, k, v, grad, grads[1], grads[2], row_blocks, *batch, *numbers, **options
    )  # fmt: skip
    launch(
        grad_bias_kernel, (heads, diagonals, SPLITS),
        q, k, v, grad, position_sums, time_sums, row_blocks, len(row_blocks), *batch, *numbers, first_diagonal,
        BLOCK_TIME=next_power_of_2(times), **options,
    )  # fmt: skip
    grad_position = sum_diagonals(position_sums.sum(0), first_diagonal, position_bias.shape[1])
    return *grads, grad_position, time_sums.sum((0, 1))
