"""Kernels that prepare a batch for attention, once for all layers and heads: its row blocks and its time buckets.

A row block is BLOCK_M consecutive rows of one user; it attends to tiles of BLOCK_N consecutive columns. Blocks are
ordered longest user first, a user's last rows first: the shortest run last, so that no multiprocessor is left with a
long one, and a user's keys are read while they are in the L2 cache.

A tile's time buckets are one byte per score, in the order in which the matrix units hold the scores
(`to_fragment_order`): a thread reads its bytes with wide loads and exchanges nothing with its neighbours.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import ceil_div, launch, next_power_of_2

MAX_CHUNK = 1024  # users whose lengths a program reads at a time


def max_row_blocks(total: int, users: int, block_m: int) -> int:
    """Return an upper bound of the row blocks of any batch of `users` with `total` rows."""
    return total // block_m + users


def max_tiles(blocks: int, max_length: int, block_m: int, block_n: int, num_contextual: int) -> int:
    """Return an upper bound of the tiles of any batch with `blocks` row blocks."""
    blocks_per_user = ceil_div(max_length, block_m)
    tiles_per_block = block_m // block_n
    if num_contextual:
        return blocks * blocks_per_user * tiles_per_block
    return blocks * (blocks_per_user + 1) * tiles_per_block // 2


@triton.jit
def count_tiles(length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr):
    """Return the tiles of a user with `length` rows.

    A block's columns end with its own rows; a block with contextual rows has all of the user's columns.
    """
    blocks = tl.cdiv(length, BLOCK_M)
    row_tiles = tl.cdiv(length, BLOCK_N)  # of a block with all columns
    full_blocks = tl.minimum(blocks, (NUM_CONTEXTUAL + BLOCK_M - 1) // BLOCK_M)
    causal_tiles = (BLOCK_M // BLOCK_N) * ((blocks - 1) * blocks - full_blocks * (full_blocks + 1)) // 2 + row_tiles
    return full_blocks * row_tiles + tl.where(blocks > full_blocks, causal_tiles, 0)


@triton.jit
def row_block_kernel(
    row_blocks, offsets, users, max_length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_CONTEXTUAL: tl.constexpr, MAX_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the row blocks of all users. Grid (users): each finds its position after all longer users.

    row_blocks: int32 [blocks, 4]: user (-1: unused), first row within the user, first tile, number of tiles.
    """
    user = tl.program_id(0)
    length = tl.minimum(tl.load(offsets + user + 1) - tl.load(offsets + user), max_length)
    first_block = 0
    first_tile = 0
    for start in range(0, users, CHUNK):
        other = start + tl.arange(0, CHUNK)
        ends = tl.load(offsets + other + 1, mask=other < users, other=0)
        lengths = tl.minimum(ends - tl.load(offsets + other, mask=other < users, other=0), max_length)
        is_before = (other < users) & ((lengths > length) | ((lengths == length) & (other < user)))
        lengths = tl.where(is_before, lengths, 0)
        first_block += tl.sum(tl.cdiv(lengths, BLOCK_M))
        first_tile += tl.sum(count_tiles(lengths, BLOCK_M, BLOCK_N, NUM_CONTEXTUAL))
    blocks = tl.cdiv(length, BLOCK_M)
    index = tl.arange(0, MAX_BLOCKS)
    row = (blocks - 1 - index) * BLOCK_M
    end_column = tl.minimum(length, row + BLOCK_M)
    if NUM_CONTEXTUAL:
        end_column = tl.where(row < NUM_CONTEXTUAL, length, end_column)
    tiles = tl.where(index < blocks, tl.cdiv(end_column, BLOCK_N), 0)
    row_block = row_blocks + (first_block + index) * 4
    tl.store(row_block, user + index * 0, mask=index < blocks)
    tl.store(row_block + 1, row, mask=index < blocks)
    tl.store(row_block + 2, first_tile + tl.cumsum(tiles) - tiles, mask=index < blocks)
    tl.store(row_block + 3, tiles, mask=index < blocks)


def fill_row_blocks(
    row_blocks: Tensor, offsets: Tensor, max_length: int, block_m: int, block_n: int, num_contextual: int
) -> None:
    """Write row_blocks, int32 [max_row_blocks, 4], for offsets int32 [users + 1], without waiting for the device."""
    users = len(offsets) - 1
    row_blocks.fill_(-1)
    if users and max_length:
        blocks = next_power_of_2(ceil_div(max_length, block_m))
        chunk = min(MAX_CHUNK, next_power_of_2(users))
        launch(
            row_block_kernel, (users,), row_blocks, offsets, users, max_length, block_m, block_n, num_contextual,
            blocks, chunk,
        )  # fmt: skip


@triton.jit
def to_fragment_order(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M, BLOCK_N] as [BLOCK_M * BLOCK_N], as the threads of BLOCK_M / 16 warps hold a product's result.

    Thread t of a warp holds rows t / 4 and t / 4 + 8, and of every 8 columns 2 * (t % 4) and the next one; 16 values
    (32 columns) are contiguous.
    """
    parts = tl.reshape(tile, [BLOCK_M // 16, 2, 8, BLOCK_N // 32, 4, 4, 2])
    return tl.reshape(tl.permute(parts, (3, 0, 2, 5, 4, 1, 6)), [BLOCK_M * BLOCK_N])


@triton.jit
def from_fragment_order(values, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return [BLOCK_M * BLOCK_N] as [BLOCK_M, BLOCK_N]: the inverse of `to_fragment_order`."""
    parts = tl.reshape(values, [BLOCK_N // 32, BLOCK_M // 16, 8, 4, 4, 2, 2])
    return tl.reshape(tl.permute(parts, (1, 5, 2, 0, 4, 3, 6)), [BLOCK_M, BLOCK_N])


@triton.jit
def find_time_bucket(elapsed, thresholds, NUM_THRESHOLDS: tl.constexpr):
    """Return how many of the thresholds, int32 [NUM_THRESHOLDS <= 255], ascending, do not exceed `elapsed`.

    A binary search.
    """
    bucket = tl.zeros_like(elapsed)
    for halving in tl.static_range(8):
        if (128 >> halving) <= NUM_THRESHOLDS:
            probe = bucket + (128 >> halving) - 1
            reached = elapsed >= tl.load(thresholds + probe, mask=probe < NUM_THRESHOLDS, other=0)
            bucket += tl.where((probe < NUM_THRESHOLDS) & reached, 128 >> halving, 0)
    return bucket


@triton.jit
def time_bucket_kernel(
    time_buckets, row_blocks, offsets, seconds, thresholds,
    NUM_THRESHOLDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the time buckets of one tile. Grid (blocks, most tiles of a block)."""
    row_block = row_blocks + tl.program_id(0) * 4
    tile = tl.program_id(1)
    user = tl.load(row_block)
    row0 = tl.load(row_block + 1)
    tile0 = tl.load(row_block + 2)
    tiles = tl.load(row_block + 3)
    if tile < tiles:  # false for an unused row block, which has -1 tiles
        start = tl.load(offsets + user)
        end = tl.load(offsets + user + 1)
        row = start + row0 + tl.arange(0, BLOCK_M)
        column = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_seconds = tl.load(seconds + row, mask=row < end, other=0)
        column_seconds = tl.load(seconds + column, mask=column < end, other=0)
        elapsed = tl.maximum(row_seconds[:, None] - column_seconds[None, :], 0)  # [BLOCK_M, BLOCK_N]
        bucket = find_time_bucket(elapsed, thresholds, NUM_THRESHOLDS).to(tl.uint8)
        pointers = time_buckets + (tile0 + tile).to(tl.int64) * (BLOCK_M * BLOCK_N) + tl.arange(0, BLOCK_M * BLOCK_N)
        tl.store(pointers, to_fragment_order(bucket, BLOCK_M, BLOCK_N))


def fill_time_buckets(
    time_buckets: Tensor,
    row_blocks: Tensor,
    offsets: Tensor,
    seconds: Tensor,
    thresholds: Tensor,
    max_length: int,
    block_m: int,
    block_n: int,
) -> None:
    """Write the time buckets of all tiles. seconds: int32 [total]; thresholds: int32 [count]."""
    if len(row_blocks) and len(seconds):
        launch(
            time_bucket_kernel, (len(row_blocks), ceil_div(max_length, block_n)),
            time_buckets, row_blocks, offsets, seconds, thresholds,
            len(thresholds), block_m, block_n, num_warps=block_m // 16,
        )  # fmt: skip
