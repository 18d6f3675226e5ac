"""Attention forward in Triton: O = SiLU(alpha Q K^T + position bias + time bias) V / N on packed rows.

A program computes one head of one row block (plan_kernels.py) and loops over its tiles of columns. A tile costs two
matrix products, one byte per score for its time bucket, and two look-ups in tables that stay in the L1 cache.
"""

import triton
import triton.language as tl

from kernels.fused_attention_layernorm import dropout
from kernels.fused_attention_layernorm.plan_kernels import find_time_bucket, from_fragment_order

PHILOX_ROUNDS = tl.constexpr(dropout.PHILOX_ROUNDS)
RANDOM_RANGE = tl.constexpr(dropout.RANDOM_RANGE)
MASKED_SCORE = tl.constexpr(-1e4)  # SiLU of it is 0, with USE_PTX too; of -inf it is NaN


@triton.jit
def silu(x, USE_PTX: tl.constexpr):
    """Return x * sigmoid(x). USE_PTX: one instruction of the special function unit, tanh to 2^-11, and two others."""
    half = x * 0.5
    if USE_PTX:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * tanh + half
    return x * tl.sigmoid(x)


@triton.jit
def load_l1(pointers, USE_PTX: tl.constexpr):
    """Load float32 values. USE_PTX: plain loads through the L1 cache; the compiler would turn `tl.load` into
    asynchronous copies of four bytes each through shared memory."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.load(pointers)


@triton.jit
def load_l1_masked(pointers, mask, USE_PTX: tl.constexpr):
    """Return `load_l1` where `mask` is true, else 0."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.nc.f32 $0, [$1]; }",
            "=f,l,r", [pointers.to(tl.int64), mask.to(tl.int32)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_user_range(user, offsets, num_positions):
    """Return int32 values of a user: its first row, and its length, at most num_positions, the width of the position
    table."""
    start = tl.load(offsets + user)
    length = tl.minimum(tl.load(offsets + user + 1) - start, num_positions)
    return start, length


@triton.jit
def is_visible(row, column, length, NUM_CONTEXTUAL: tl.constexpr):
    """Return bool [BLOCK_M, BLOCK_N]: a row of the user's `length` rows sees its own column and earlier ones.

    The first NUM_CONTEXTUAL rows describe the user, not a moment: they see all rows.
    """
    visible = row[:, None] >= column[None, :]
    if NUM_CONTEXTUAL:
        visible = (visible | (row[:, None] < NUM_CONTEXTUAL)) & (column[None, :] < length)
    return visible


@triton.jit
def keep_mask(seed, row, tile, head, BLOCK_N: tl.constexpr, KEEP_THRESHOLD: tl.constexpr):
    """Return bool [BLOCK_M, BLOCK_N], equal to dropout.keep_mask. row: index in the packed batch.

    Eight columns of a thread share a draw: the compiler sees that their counters are equal and draws once.
    """
    column = tl.arange(0, BLOCK_N)
    group = tile * (BLOCK_N // 8) + (column >> 5) * 4 + ((column >> 1) & 3)
    words = tl.philox(seed, row[:, None], group[None, :], head, 0, PHILOX_ROUNDS)  # four words
    index = ((column >> 3) & 3)[None, :]
    word = tl.where(index < 2, tl.where(index == 0, words[0], words[1]), tl.where(index == 2, words[2], words[3]))
    return ((word >> ((column & 1) * 16)[None, :].to(tl.uint32)) & (RANDOM_RANGE - 1)) < KEEP_THRESHOLD


@triton.jit
def attend_row_block(
    q, k, v, start, row0, tiles, num_unmasked_tiles, length, time_buckets, position_bias, time_bias, seed, alpha, head,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr, USE_PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return float32 [BLOCK_M, D_V]: SiLU(...) V of one head and one row block. The first tiles need no mask."""
    # Rows past the user's end repeat its last row; they are never stored.
    row = tl.minimum(row0 + tl.arange(0, BLOCK_M), length - 1)
    column = tl.arange(0, BLOCK_N)
    # Pointers minus columns: the compiler turns the columns into constant offsets of the loads.
    position = (position_bias + row)[:, None] - column.to(tl.int64)[None, :]
    q_tile = q.load([start + row0, head * D_QK])
    result = tl.zeros([BLOCK_M, D_V], tl.float32)
    for tile in range(num_unmasked_tiles):
        k_tile = k.load([start + tile * BLOCK_N, head * D_QK])
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        bucket = tl.load(time_buckets + tile * (BLOCK_M * BLOCK_N))
        bucket = from_fragment_order(bucket, BLOCK_M, BLOCK_N).to(tl.int32)
        bias = load_l1(time_bias + bucket, USE_PTX) + load_l1(position - tile * BLOCK_N, USE_PTX)
        weights = silu(scores * alpha + bias, USE_PTX)
        if KEEP_THRESHOLD < RANDOM_RANGE:
            weights = tl.where(keep_mask(seed, start + row, tile, head, BLOCK_N, KEEP_THRESHOLD), weights, 0.0)
        v_tile = v.load([start + tile * BLOCK_N, head * D_V])
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
    for tile in range(num_unmasked_tiles, tiles):
        k_tile = k.load([start + tile * BLOCK_N, head * D_QK])
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        visible = is_visible(row, tile * BLOCK_N + column, length, NUM_CONTEXTUAL)
        bucket = tl.load(time_buckets + tile * (BLOCK_M * BLOCK_N))
        bucket = from_fragment_order(bucket, BLOCK_M, BLOCK_N).to(tl.int32)
        tile_position = position - tile * BLOCK_N
        if NUM_CONTEXTUAL:  # columns after the row count as distance 0
            tile_position += tl.maximum(tile * BLOCK_N + column[None, :] - row[:, None], 0)
        bias = load_l1(time_bias + bucket, USE_PTX) + load_l1_masked(tile_position, visible, USE_PTX)
        weights = silu(tl.where(visible, scores * alpha + bias, MASKED_SCORE), USE_PTX)
        if KEEP_THRESHOLD < RANDOM_RANGE:
            weights = tl.where(keep_mask(seed, start + row, tile, head, BLOCK_N, KEEP_THRESHOLD), weights, 0.0)
        v_tile = v.load([start + tile * BLOCK_N, head * D_V])
        # The next user's rows may be NaN.
        v_tile = tl.where((tile * BLOCK_N + column < length)[:, None], v_tile, 0.0)
        result = tl.dot(weights.to(v_tile.dtype), v_tile, result, input_precision=PRECISION)
    return result


@triton.jit
def attention_kernel(
    q, k, v, attn_out, row_stats, row_blocks, offsets, time_buckets, position_bias, time_bias, seed, alpha, scale,
    num_positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, TIME_BUCKETS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, KEEP_THRESHOLD: tl.constexpr,
    USE_PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write attn_out = scale * SiLU(...) V. Grid (heads * blocks), heads first: the other axes end at 65,535 programs.

    q, k, v: descriptors of [tokens, HEADS * d] in tiles; attn_out: [tokens, HEADS * D_V]; row_stats: float32 [tokens,
    HEADS, 2], sum and sum of squares of each head's part of a row of attn_out.
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
    num_unmasked_tiles = tl.minimum(row0, length) // BLOCK_N
    if NUM_CONTEXTUAL:
        num_unmasked_tiles = tl.where(row0 < NUM_CONTEXTUAL, 0, num_unmasked_tiles)
    result = scale * attend_row_block(
        q, k, v, start, row0, tiles, num_unmasked_tiles, length,
        time_buckets + tile0.to(tl.int64) * (BLOCK_M * BLOCK_N) + tl.arange(0, BLOCK_M * BLOCK_N),
        position_bias + head * num_positions, time_bias + head * TIME_BUCKETS, tl.load(seed), alpha, head,
        D_QK, D_V, BLOCK_M, BLOCK_N, NUM_CONTEXTUAL, KEEP_THRESHOLD, USE_PTX, PRECISION,
    )  # fmt: skip
    row = row0 + tl.arange(0, BLOCK_M)
    column = tl.arange(0, D_V)
    token = start.to(tl.int64) + row
    valid = row < length
    out_pointers = attn_out + token[:, None] * (HEADS * D_V) + (head * D_V + column)[None, :]
    tl.store(out_pointers, result.to(attn_out.dtype.element_ty), mask=valid[:, None])
    stats_pointers = row_stats + (token * HEADS + head) * 2
    tl.store(stats_pointers, tl.sum(result, 1), mask=valid)
    tl.store(stats_pointers + 1, tl.sum(result * result, 1), mask=valid)


@triton.jit
def last_attention_kernel(
    q, k, v, attn_out, row_stats, offsets, seconds, thresholds, position_bias, time_bias,
    q_stride, k_stride, v_stride, alpha, scale, num_positions,
    HEADS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    TIME_BUCKETS: tl.constexpr, BLOCK_N: tl.constexpr, USE_PTX: tl.constexpr,
):  # fmt: skip
    """Write attn_out and row_stats of each user's last row only. Grid (heads * users).

    q: [users, HEADS * D_QK]; attn_out: [users, HEADS * D_V]. One row is too little work for the matrix units; the
    kernel reads K and V once, at the memory's speed.
    """
    head = tl.program_id(0) % HEADS
    user = (tl.program_id(0) // HEADS).to(tl.int64)
    start = tl.load(offsets + user).to(tl.int64)
    end = tl.load(offsets + user + 1).to(tl.int64)
    length = tl.minimum((end - start).to(tl.int32), num_positions)
    column = tl.arange(0, BLOCK_N)
    d_qk = tl.arange(0, BLOCK_QK)
    d_v = tl.arange(0, BLOCK_V)
    q_row = tl.load(q + user * q_stride + head * D_QK + d_qk, mask=d_qk < D_QK, other=0.0).to(tl.float32)
    last_seconds = tl.load(seconds + end - 1, mask=end > start, other=0)
    accumulator = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, length, BLOCK_N):
        token = start + first + column
        valid = first + column < length
        k_pointers = k + token[:, None] * k_stride + (head * D_QK + d_qk)[None, :]
        v_pointers = v + token[:, None] * v_stride + (head * D_V + d_v)[None, :]
        k_tile = tl.load(k_pointers, mask=valid[:, None] & (d_qk < D_QK)[None, :], other=0.0).to(tl.float32)
        v_tile = tl.load(v_pointers, mask=valid[:, None] & (d_v < D_V)[None, :], other=0.0).to(tl.float32)
        elapsed = tl.maximum(last_seconds - tl.load(seconds + token, mask=valid, other=0), 0)
        bucket = find_time_bucket(elapsed, thresholds, TIME_BUCKETS - 1)
        bias = tl.load(time_bias + head * TIME_BUCKETS + bucket)
        distance = tl.maximum(length - 1 - first - column, 0)
        bias += tl.load(position_bias + head * num_positions + distance)
        scores = tl.sum(q_row[None, :] * k_tile, 1) * alpha + bias  # [BLOCK_N]
        weights = tl.where(valid, silu(scores, USE_PTX), 0.0)
        accumulator += weights[:, None] * v_tile
    row = tl.sum(accumulator, 0) * scale  # [BLOCK_V]
    out_pointers = attn_out + user * (HEADS * D_V) + head * D_V + d_v
    tl.store(out_pointers, row.to(attn_out.dtype.element_ty), mask=d_v < D_V)
    tl.store(row_stats + (user * HEADS + head) * 2, tl.sum(row, 0))
    tl.store(row_stats + (user * HEADS + head) * 2 + 1, tl.sum(row * row, 0))
