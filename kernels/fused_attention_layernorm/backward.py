"""Attention's backward pass in Triton. Scores are computed anew; three kernels, so that none needs atomics.

With x = alpha q k + bias, a = m SiLU(x) where m = 0 drops a weight and m = 1 keeps it, and g = the gradient of the
result, A V / (N (1 - p)), divided by N (1 - p):
    dV = A^T g,   dx = m (g V^T) * SiLU'(x),   dQ = alpha dx K,   dK = alpha dx^T Q,   dbias = sums of dx
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.dropout import kept_of
from kernels.fused_attention_layernorm.kernel import WHOLE, is_kept, is_visible, rows_of
from kernels.fused_attention_layernorm.launch import given, precision
from kernels.fused_attention_layernorm.plan_kernels import tile_order
from kernels.launch import ceil_div, launch, next_power_of_2

# Programs that share the tiles of one diagonal; with 8 of them many short users take twice as long (21.3 ms against
# 9.4, `tests.benchmarks.training_steps`, tiny in bfloat16 on an H100).
SPLITS = 64


@triton.jit
def score_tile(
    q_tile, k_tile, v_tile, grad_tile, row, tile, start, length, seen, bucket_at, position_bias, time_bias,
    seed, head, alpha,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of [ROWS, COLUMNS] scores: a, dx, and each one's time bucket; 0 where nothing is seen or kept."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    visible = is_visible(row, column, seen, CONTEXTUAL, HAS_TARGETS)
    visible = visible & (row < length)[:, None] & (column < length)[None, :]
    bucket = tile_order(tl.load(bucket_at + tl.arange(0, ROWS * COLUMNS)), ROWS, COLUMNS).to(tl.int32)
    distance = tl.maximum(row[:, None] - column[None, :], 0)
    bias = tl.load(time_bias + bucket) + tl.load(position_bias + distance, mask=visible, other=0.0)
    x = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * alpha + bias
    sigmoid = tl.sigmoid(x)
    slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    above = tl.dot(grad_tile, v_tile.T, input_precision=PRECISION)
    if KEPT < WHOLE:
        visible = visible & is_kept(seed, start.to(tl.int32) + row, tile, head, COLUMNS, KEPT)
    return tl.where(visible, x * sigmoid, 0.0), tl.where(visible, above * slope, 0.0), bucket


@triton.jit
def load_rows(x, row, length, stride, D: tl.constexpr):
    """[rows, D] of a user's rows; 0 beyond its length."""
    at = x + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(row < length)[:, None], other=0.0)


@triton.jit
def grad_q_kernel(
    q, k, v, grad, grad_q, items, offsets, targets, buckets, position_bias, time_bias, seed,
    q_stride, k_stride, v_stride, alpha, positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads * blocks): over the tiles of a row block.

    grad: [tokens, HEADS * D_V]; grad_q: [tokens, HEADS * D_QK]."""
    head, item = tl.program_id(0) % HEADS, items + tl.program_id(0) // HEADS * 4
    user, row0, tile0, tiles = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    if user < 0:
        return
    start, length, seen = rows_of(user, offsets, targets, positions, HAS_TARGETS)  # type: ignore[misc]  # Triton's call
    start = start.to(tl.int64)
    row = row0 + tl.arange(0, ROWS)
    q_tile = load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK)
    grad_tile = load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V)
    result = tl.zeros([ROWS, D_QK], tl.float32)
    for tile in range(tiles):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        k_tile = load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK)
        v_tile = load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V)
        _, slope, _ = score_tile(
            q_tile, k_tile, v_tile, grad_tile, row, tile, start, length, seen,
            buckets + (tile0 + tile).to(tl.int64) * (ROWS * COLUMNS), position_bias + head * positions,
            time_bias + head * TIMES, tl.load(seed), head, alpha, ROWS, COLUMNS, CONTEXTUAL, HAS_TARGETS, KEPT,
            PRECISION,
        )  # fmt: skip
        result = tl.dot(slope.to(k_tile.dtype), k_tile, result, input_precision=PRECISION)
    at = grad_q + (start + row)[:, None] * (HEADS * D_QK) + (head * D_QK + tl.arange(0, D_QK))[None, :]
    tl.store(at, (result * alpha).to(grad_q.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def grad_kv_kernel(
    q, k, v, grad, grad_k, grad_v, items, offsets, targets, buckets, position_bias, time_bias, seed,
    q_stride, k_stride, v_stride, alpha, positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads * blocks, ROWS / COLUMNS): over the row blocks that see one tile's columns. A user's blocks lie
    together, the last first, so the next one of its rows is the item before."""
    head, turn = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    user, row0 = tl.load(items + turn * 4), tl.load(items + turn * 4 + 1)
    if user < 0:
        return
    start, length, seen = rows_of(user, offsets, targets, positions, HAS_TARGETS)  # type: ignore[misc]  # Triton's call
    start = start.to(tl.int64)
    tile = row0 // COLUMNS + tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    k_tile = load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK)
    v_tile = load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V)
    result_k, result_v = tl.zeros([COLUMNS, D_QK], tl.float32), tl.zeros([COLUMNS, D_V], tl.float32)
    first = 0 if CONTEXTUAL else row0 // ROWS
    for block in range(first, tl.cdiv(length, ROWS)):
        item = items + (turn - (block - row0 // ROWS)) * 4
        if tile < tl.load(item + 3):
            row = block * ROWS + tl.arange(0, ROWS)
            q_tile = load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK)
            grad_tile = load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V)
            weights, slope, _ = score_tile(
                q_tile, k_tile, v_tile, grad_tile, row, tile, start, length, seen,
                buckets + (tl.load(item + 2) + tile).to(tl.int64) * (ROWS * COLUMNS), position_bias + head * positions,
                time_bias + head * TIMES, tl.load(seed), head, alpha, ROWS, COLUMNS, CONTEXTUAL, HAS_TARGETS, KEPT,
                PRECISION,
            )  # fmt: skip
            result_v = tl.dot(tl.trans(weights.to(v_tile.dtype)), grad_tile, result_v, input_precision=PRECISION)
            result_k = tl.dot(tl.trans(slope.to(q_tile.dtype)), q_tile, result_k, input_precision=PRECISION)
    at, kept = (start + column)[:, None], (column < length)[:, None]
    k_at = grad_k + at * (HEADS * D_QK) + (head * D_QK + tl.arange(0, D_QK))[None, :]
    v_at = grad_v + at * (HEADS * D_V) + (head * D_V + tl.arange(0, D_V))[None, :]
    tl.store(k_at, (result_k * alpha).to(grad_k.dtype.element_ty), mask=kept)
    tl.store(v_at, result_v.to(grad_v.dtype.element_ty), mask=kept)


@triton.jit
def grad_bias_kernel(
    q, k, v, grad, by_position, by_time, items, item_count, offsets, targets, buckets, position_bias, time_bias, seed,
    q_stride, k_stride, v_stride, alpha, positions, first_diagonal,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIMES: tl.constexpr, TIME_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads, diagonals, SPLITS): over all tiles at one distance from the diagonal, which share their positions.

    by_position: float32 [SPLITS, diagonals, HEADS, ROWS * COLUMNS], a tile's sums; by_time: [..., TIMES].
    """
    head, diagonal, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    times = tl.arange(0, TIME_BLOCK)
    tile_sum, time_sum = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([TIME_BLOCK], tl.float32)
    for turn in range(split, item_count, tl.num_programs(2)):
        item = items + turn * 4
        user, row0, tile0, tiles = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
        tile = row0 // COLUMNS - diagonal - first_diagonal
        if (user >= 0) & (tile >= 0) & (tile < tiles):
            start, length, seen = rows_of(user, offsets, targets, positions, HAS_TARGETS)  # type: ignore[misc]  # Triton's call
            start = start.to(tl.int64)
            row, column = row0 + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
            _, slope, bucket = score_tile(
                load_rows(q + start * q_stride + head * D_QK, row, length, q_stride, D_QK),
                load_rows(k + start * k_stride + head * D_QK, column, length, k_stride, D_QK),
                load_rows(v + start * v_stride + head * D_V, column, length, v_stride, D_V),
                load_rows(grad + start * HEADS * D_V + head * D_V, row, length, HEADS * D_V, D_V),
                row, tile, start, length, seen, buckets + (tile0 + tile).to(tl.int64) * (ROWS * COLUMNS),
                position_bias + head * positions, time_bias + head * TIMES, tl.load(seed), head, alpha,
                ROWS, COLUMNS, CONTEXTUAL, HAS_TARGETS, KEPT, PRECISION,
            )  # fmt: skip
            tile_sum += slope
            for time in range(tl.min(bucket), tl.max(bucket) + 1):  # far from the diagonal a tile has few buckets
                time_sum += tl.where(times == time, tl.sum(tl.where(bucket == time, slope, 0.0)), 0.0)
    place = ((split * tl.num_programs(1) + diagonal) * HEADS + head).to(tl.int64)
    cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(by_position + place * (ROWS * COLUMNS) + cell, tile_sum)
    tl.store(by_time + place * TIMES + times, time_sum, mask=times < TIMES)


def along_diagonals(tiles: Tensor, first_diagonal: int, positions: int) -> Tensor:
    """Tiles' sums [diagonals, heads, ROWS, COLUMNS] -> by distance [heads, positions]; below 0 counts as 0.

    Tile d's row r and column c lie (first_diagonal + d) * COLUMNS + r - c apart. A padded row that is one shorter than
    the tile's stride shifts each row by one, and puts equal distances below each other.
    """
    count, heads, rows, columns = tiles.shape
    width = rows + columns
    sheared = torch.nn.functional.pad(tiles.flip(3), (0, rows)).flatten(2)[:, :, : rows * (width - 1)]
    lines = sheared.unflatten(2, (rows, width - 1)).sum(2)  # [diagonals, heads, width - 1], from r - c = 1 - COLUMNS on
    parts = torch.nn.functional.pad(lines, (0, 1)).unflatten(2, (width // columns, columns))
    sums = tiles.new_zeros((heads, count + width // columns - 1, columns))
    for step in range(width // columns):
        sums[:, step : step + count] += parts[:, :, step].transpose(0, 1)
    flat = sums.flatten(1)  # its place i is the distance i + 1 - COLUMNS + first_diagonal * COLUMNS
    zero = columns - 1 - first_diagonal * columns
    result = torch.nn.functional.pad(flat[:, zero:], (0, max(0, positions - flat.shape[1] + zero)))[:, :positions]
    result = result.clone()
    result[:, 0] += flat[:, :zero].sum(1)
    return result


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, targets: Tensor | None, items: Tensor,
    buckets: Tensor, position_bias: Tensor, time_bias: Tensor, seed: Tensor | None, alpha: float, dropout: float,
    contextual: int, max_length: int, rows: int, columns: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """grad: [total, heads * d_v], `gate_backward`'s, in q's dtype; all else as `attend`.

    -> the gradients of q, k, v, and of the two tables in float32. Equal inputs give equal bits.
    """
    (total, heads, d_qk), d_v = q.shape, v.shape[2]
    grads = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (q, k, v)]
    if not total or not len(items):
        return *grads, torch.zeros_like(position_bias), torch.zeros_like(time_bias)
    reach = ceil_div(max_length, columns)
    first_diagonal = -reach if contextual else 1 - rows // columns
    diagonals, times = reach - first_diagonal, time_bias.shape[1]
    by_position = q.new_empty((SPLITS, diagonals, heads, rows, columns), dtype=torch.float32)
    by_time = q.new_empty((SPLITS, diagonals, heads, times), dtype=torch.float32)
    batch = (offsets, given(targets, offsets), buckets, position_bias, time_bias, given(seed, offsets))
    numbers = (q.stride(0), k.stride(0), v.stride(0), alpha, position_bias.shape[1])
    options = {
        "HEADS": heads, "D_QK": d_qk, "D_V": d_v, "TIMES": times, "ROWS": rows, "COLUMNS": columns,
        "CONTEXTUAL": contextual, "HAS_TARGETS": targets is not None, "KEPT": kept_of(dropout),
        "PRECISION": precision(q.dtype), "num_warps": rows // 16, "num_stages": 1,
    }  # fmt: skip
    launch(grad_q_kernel, (heads * len(items),), q, k, v, grad, grads[0], items, *batch, *numbers, **options)
    launch(
            grad_kv_kernel, (heads * len(items), rows // columns),
        q, k, v, grad, grads[1], grads[2], items, *batch, *numbers, **options
    )  # fmt: skip
    launch(
            grad_bias_kernel, (heads, diagonals, SPLITS),
        q, k, v, grad, by_position, by_time, items, len(items), *batch, *numbers, first_diagonal,
        TIME_BLOCK=next_power_of_2(times), **options,
    )  # fmt: skip
    positions = along_diagonals(by_position.sum(0), first_diagonal, position_bias.shape[1])
    return *grads, positions, by_time.sum((0, 1))
