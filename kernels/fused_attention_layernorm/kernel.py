"""Attention forward in Triton: O = SiLU(alpha Q K^T + position bias + time bias) V / N on packed rows.

A program owns one head of one row block (plan.py) and walks over its tiles of columns. A tile costs two matrix
products, a byte a score for its time bucket, and two look-ups in tables that stay in the multiprocessor's first cache.
"""

import triton
import triton.language as tl

from kernels.fused_attention_layernorm import dropout
from kernels.fused_attention_layernorm.plan_kernels import bucket_of, tile_order

ROUNDS, WHOLE = tl.constexpr(dropout.ROUNDS), tl.constexpr(dropout.WHOLE)
HIDDEN = tl.constexpr(-1e4)  # SiLU of it is 0, in the fast form too; of -inf it is NaN


@triton.jit
def silu(x, FAST: tl.constexpr):
    """x * sigmoid(x). FAST: one instruction of the special unit, tanh to 2^-11, and two of the others."""
    half = x * 0.5
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half
    return x * tl.sigmoid(x)


@triton.jit
def read(places, FAST: tl.constexpr):
    """What float32 pointers point to. FAST: a plain load through the first cache; the compiler would stage `tl.load`
    as asynchronous copies of four bytes each through shared memory."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [places.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.load(places)


@triton.jit
def read_if(places, wanted, FAST: tl.constexpr):
    """As `read`, 0 where not `wanted`."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.nc.f32 $0, [$1]; }",
            "=f,l,r", [places.to(tl.int64), wanted.to(tl.int32)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(places, mask=wanted, other=0.0)


@triton.jit
def rows_of(user, offsets, targets, positions, HAS_TARGETS: tl.constexpr):
    """int32 of a user: its first row, how many it has that the position table knows, the first of them that is a
    target."""
    start = tl.load(offsets + user)
    length = tl.minimum(tl.load(offsets + user + 1) - start, positions)
    seen = length
    if HAS_TARGETS:
        seen = length - tl.load(targets + user)
    return start, length, seen


@triton.jit
def is_visible(row, column, seen, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr):
    """bool [ROWS, COLUMNS]: a row's own column and earlier ones, if they are no targets (`seen`: the first target).

    The first CONTEXTUAL rows describe the user, not a moment: they see all rows but the targets.
    """
    visible = row[:, None] >= column[None, :]
    if CONTEXTUAL:
        visible = visible | (row[:, None] < CONTEXTUAL)
    if CONTEXTUAL or HAS_TARGETS:
        visible = (visible & (column[None, :] < seen)) | (row[:, None] == column[None, :])
    return visible


@triton.jit
def is_kept(seed, row, tile, head, COLUMNS: tl.constexpr, KEPT: tl.constexpr):
    """bool [ROWS, COLUMNS] as dropout.is_kept; row: in the packed batch. Eight columns of a thread share a draw: the
    compiler sees that their counters are equal and draws once."""
    column = tl.arange(0, COLUMNS)
    group = tile * (COLUMNS // 8) + (column >> 5) * 4 + ((column >> 1) & 3)
    words = tl.philox(seed, row[:, None], group[None, :], head, 0, ROUNDS)  # four
    place = ((column >> 3) & 3)[None, :]
    word = tl.where(place < 2, tl.where(place == 0, words[0], words[1]), tl.where(place == 2, words[2], words[3]))
    return ((word >> ((column & 1) * 16)[None, :].to(tl.uint32)) & (WHOLE - 1)) < KEPT


@triton.jit
def widened(values):
    """FP8 becomes float16: one instruction for two values; to bfloat16 it takes five."""
    return values.to(tl.float16) if values.dtype == tl.float8e4nv else values


@triton.jit
def attend_block(
    q, k, v, start, row0, tiles, whole, length, seen, buckets, position_bias, time_bias, seed, alpha, head,
    D_QK: tl.constexpr, D_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr, KEPT: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, D_V]: one head's SiLU(...) V of one row block. The first `whole` tiles need no mask."""
    # Rows beyond the user's end are never stored; they do as the last row does.
    row, column = tl.minimum(row0 + tl.arange(0, ROWS), length - 1), tl.arange(0, COLUMNS)
    # Pointers minus columns: the compiler turns the columns into the loads' constant offsets.
    position = (position_bias + row)[:, None] - column.to(tl.int64)[None, :]
    q_tile = q.load([start + row0, head * D_QK])
    result = tl.zeros([ROWS, D_V], tl.float32)
    for tile in range(whole):
        k_tile = k.load([start + tile * COLUMNS, head * D_QK])
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        bucket = tile_order(tl.load(buckets + tile * (ROWS * COLUMNS)), ROWS, COLUMNS).to(tl.int32)
        bias = read(time_bias + bucket, FAST) + read(position - tile * COLUMNS, FAST)
        weights = silu(scores * alpha + bias, FAST)
        if KEPT < WHOLE:
            weights = tl.where(is_kept(seed, start + row, tile, head, COLUMNS, KEPT), weights, 0.0)
        v_tile = widened(v.load([start + tile * COLUMNS, head * D_V]))
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
    for tile in range(whole, tiles):
        k_tile = k.load([start + tile * COLUMNS, head * D_QK])
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        visible = is_visible(row, tile * COLUMNS + column, seen, CONTEXTUAL, HAS_TARGETS)
        bucket = tile_order(tl.load(buckets + tile * (ROWS * COLUMNS)), ROWS, COLUMNS).to(tl.int32)
        near = position - tile * COLUMNS
        if CONTEXTUAL:  # columns after the row count as distance 0
            near += tl.maximum(tile * COLUMNS + column[None, :] - row[:, None], 0)
        bias = read(time_bias + bucket, FAST) + read_if(near, visible, FAST)
        weights = silu(tl.where(visible, scores * alpha + bias, HIDDEN), FAST)
        if KEPT < WHOLE:
            weights = tl.where(is_kept(seed, start + row, tile, head, COLUMNS, KEPT), weights, 0.0)
        v_tile = widened(v.load([start + tile * COLUMNS, head * D_V]))
        v_tile = tl.where((tile * COLUMNS + column < length)[:, None], v_tile, 0.0)  # the next user's rows may be NaN
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
    return result


@triton.jit
def attention_kernel(
    q, k, v, attended, moments, items, offsets, targets, buckets, position_bias, time_bias, seed,
    alpha, scale, positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIMES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, HAS_TARGETS: tl.constexpr,
    KEPT: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads * blocks), heads first: one axis, as the others end at 65,535 programs.

    q, k, v: descriptors of [tokens, HEADS * d] in tiles; attended: [tokens, HEADS * D_V]; moments: float32 [tokens,
    HEADS, 2], the sum and the sum of squares of each head's part of a row of `attended`.
    """
    head, item = tl.program_id(0) % HEADS, items + tl.program_id(0) // HEADS * 4
    user, row0, tile0, tiles = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    if user < 0:
        return
    start, length, seen = rows_of(user, offsets, targets, positions, HAS_TARGETS)  # type: ignore[misc]  # Triton's call
    whole = tl.minimum(row0, seen) // COLUMNS  # tiles that need no mask
    if CONTEXTUAL:
        whole = tl.where(row0 < CONTEXTUAL, 0, whole)
    result = scale * attend_block(
        q, k, v, start, row0, tiles, whole, length, seen,
        buckets + tile0.to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS),
        position_bias + head * positions, time_bias + head * TIMES, tl.load(seed), alpha, head,
        D_QK, D_V, ROWS, COLUMNS, CONTEXTUAL, HAS_TARGETS, KEPT, FAST, PRECISION,
    )  # fmt: skip
    row, part = row0 + tl.arange(0, ROWS), tl.arange(0, D_V)
    at, kept = start.to(tl.int64) + row, row < length
    out_at = attended + at[:, None] * (HEADS * D_V) + (head * D_V + part)[None, :]
    tl.store(out_at, result.to(attended.dtype.element_ty), mask=kept[:, None])
    moment_at = moments + (at * HEADS + head) * 2
    tl.store(moment_at, tl.sum(result, 1), mask=kept)
    tl.store(moment_at + 1, tl.sum(result * result, 1), mask=kept)


@triton.jit
def last_attention_kernel(
    q, k, v, attended, moments, offsets, seconds, thresholds, position_bias, time_bias,
    q_stride, k_stride, v_stride, alpha, scale, positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TIMES: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Grid (heads * users): each user's newest row alone. q: [users, HEADS * D_QK]; attended: [users, HEADS * D_V].

    One row has no work for the matrix units; it reads K and V once, at the memory's speed.
    """
    head, user = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    start, end = tl.load(offsets + user).to(tl.int64), tl.load(offsets + user + 1).to(tl.int64)
    length = tl.minimum((end - start).to(tl.int32), positions)
    column, d_qk, d_v = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    q_row = tl.load(q + user * q_stride + head * D_QK + d_qk, mask=d_qk < D_QK, other=0.0).to(tl.float32)
    now = tl.load(seconds + end - 1, mask=end > start, other=0)
    accumulator = tl.zeros([COLUMNS, BLOCK_V], tl.float32)
    for first in range(0, length, COLUMNS):
        at, valid = start + first + column, first + column < length
        k_at = k + at[:, None] * k_stride + (head * D_QK + d_qk)[None, :]
        v_at = v + at[:, None] * v_stride + (head * D_V + d_v)[None, :]
        k_tile = tl.load(k_at, mask=valid[:, None] & (d_qk < D_QK)[None, :], other=0.0).to(tl.float32)
        v_tile = tl.load(v_at, mask=valid[:, None] & (d_v < D_V)[None, :], other=0.0).to(tl.float32)
        elapsed = tl.maximum(now - tl.load(seconds + at, mask=valid, other=0), 0)
        bias = tl.load(time_bias + head * TIMES + bucket_of(elapsed, thresholds, TIMES - 1))
        distance = tl.maximum(length - 1 - first - column, 0)
        bias += tl.load(position_bias + head * positions + distance)
        scores = tl.sum(q_row[None, :] * k_tile, 1) * alpha + bias  # [COLUMNS]
        weights = tl.where(valid, silu(scores, FAST), 0.0)
        accumulator += weights[:, None] * v_tile
    row = tl.sum(accumulator, 0) * scale  # [BLOCK_V]
    tl.store(attended + user * (HEADS * D_V) + head * D_V + d_v, row.to(attended.dtype.element_ty), mask=d_v < D_V)
    tl.store(moments + (user * HEADS + head) * 2, tl.sum(row, 0))
    tl.store(moments + (user * HEADS + head) * 2 + 1, tl.sum(row * row, 0))
