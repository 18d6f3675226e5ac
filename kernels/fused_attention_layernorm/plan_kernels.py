"""What attention needs to know of a batch, once for all layers and heads: its row blocks and its time buckets.

A row block is ROWS consecutive rows of one user; it attends to tiles of COLUMNS consecutive columns. Blocks are ordered
longest user first, a user's last rows first: the shortest ones run last, so that no multiprocessor is left with a long
one, and a user's keys are read while they lie in the second cache.

A tile's time buckets are one byte a score, in the order in which the matrix units hold the scores (`fragment_order`): a
thread reads its bytes with wide loads and needs no exchange with its neighbours.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import ceil_div, launch, next_power_of_2

CHUNK = 1024  # users whose lengths one look takes in


def block_bound(total: int, users: int, rows: int) -> int:
    """No batch of `users` with `total` rows has more row blocks."""
    return total // rows + users


def tile_bound(blocks: int, max_length: int, rows: int, columns: int, contextual: int) -> int:
    """No batch of that many blocks has more tiles."""
    deepest = ceil_div(max_length, rows)
    return blocks * deepest * (rows // columns) if contextual else blocks * (deepest + 1) * (rows // columns) // 2


@triton.jit
def tiles_of(length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr):
    """Tiles of a user of that many rows: a block's columns end with its own rows; those of contextual ones do not."""
    blocks, wide = tl.cdiv(length, ROWS), tl.cdiv(length, COLUMNS)
    whole = tl.minimum(blocks, (CONTEXTUAL + ROWS - 1) // ROWS)
    rest = (ROWS // COLUMNS) * ((blocks - 1) * blocks - whole * (whole + 1)) // 2 + wide
    return whole * wide + tl.where(blocks > whole, rest, 0)


@triton.jit
def plan_kernel(
    items, offsets, users, max_length,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONTEXTUAL: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (users): each finds its place behind all longer users and writes its own blocks.

    items: int32 [blocks, 4]: user (-1: none), first row within the user, first tile, number of tiles.
    """
    user = tl.program_id(0)
    length = tl.minimum(tl.load(offsets + user + 1) - tl.load(offsets + user), max_length)
    first_block, first_tile = 0, 0
    for start in range(0, users, CHUNK):
        other = start + tl.arange(0, CHUNK)
        ends = tl.load(offsets + other + 1, mask=other < users, other=0)
        lengths = tl.minimum(ends - tl.load(offsets + other, mask=other < users, other=0), max_length)
        ahead = (other < users) & ((lengths > length) | ((lengths == length) & (other < user)))
        lengths = tl.where(ahead, lengths, 0)
        first_block += tl.sum(tl.cdiv(lengths, ROWS))
        first_tile += tl.sum(tiles_of(lengths, ROWS, COLUMNS, CONTEXTUAL))
    count = tl.cdiv(length, ROWS)
    turn = tl.arange(0, BLOCKS)
    row = (count - 1 - turn) * ROWS
    reach = tl.minimum(length, row + ROWS)
    if CONTEXTUAL:
        reach = tl.where(row < CONTEXTUAL, length, reach)
    tiles = tl.where(turn < count, tl.cdiv(reach, COLUMNS), 0)
    at = items + (first_block + turn) * 4
    tl.store(at, user + turn * 0, mask=turn < count)
    tl.store(at + 1, row, mask=turn < count)
    tl.store(at + 2, first_tile + tl.cumsum(tiles) - tiles, mask=turn < count)
    tl.store(at + 3, tiles, mask=turn < count)


def plan_items(items: Tensor, offsets: Tensor, max_length: int, rows: int, columns: int, contextual: int) -> None:
    """Writes items int32 [block_bound, 4] of offsets int32 [users + 1], without waiting for the device."""
    users = len(offsets) - 1
    items.fill_(-1)
    if users and max_length:
        blocks = next_power_of_2(ceil_div(max_length, rows))
        chunk = min(CHUNK, next_power_of_2(users))
        launch(plan_kernel, (users,), items, offsets, users, max_length, rows, columns, contextual, blocks, chunk)


@triton.jit
def fragment_order(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> [ROWS * COLUMNS] as the threads of ROWS / 16 warps hold a matrix unit's result.

    Thread t of a warp holds rows t / 4 and t / 4 + 8, columns 2 * (t % 4) and the next one of every 8 columns; 16
    values (32 columns) lie together.
    """
    parts = tl.reshape(tile, [ROWS // 16, 2, 8, COLUMNS // 32, 4, 4, 2])
    return tl.reshape(tl.permute(parts, (3, 0, 2, 5, 4, 1, 6)), [ROWS * COLUMNS])


@triton.jit
def tile_order(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `fragment_order`: [ROWS * COLUMNS] -> [ROWS, COLUMNS]."""
    parts = tl.reshape(values, [COLUMNS // 32, ROWS // 16, 8, 4, 4, 2, 2])
    return tl.reshape(tl.permute(parts, (1, 5, 2, 0, 4, 3, 6)), [ROWS, COLUMNS])


@triton.jit
def bucket_of(elapsed, thresholds, COUNT: tl.constexpr):
    """How many of the ascending int32 thresholds [COUNT], at most 255, are not above `elapsed`: a binary search."""
    bucket = tl.zeros_like(elapsed)
    for halving in tl.static_range(8):
        if (128 >> halving) <= COUNT:
            probe = bucket + (128 >> halving) - 1
            reached = elapsed >= tl.load(thresholds + probe, mask=probe < COUNT, other=0)
            bucket += tl.where((probe < COUNT) & reached, 128 >> halving, 0)
    return bucket


@triton.jit
def bucket_kernel(
    buckets, items, offsets, seconds, thresholds, COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Grid (blocks, most tiles of a block): a program fills one tile."""
    item, tile = items + tl.program_id(0) * 4, tl.program_id(1)
    user, row0, tile0, tiles = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    if tile < tiles:  # never of an unused item: -1 tiles
        start, end = tl.load(offsets + user), tl.load(offsets + user + 1)
        row, column = start + row0 + tl.arange(0, ROWS), start + tile * COLUMNS + tl.arange(0, COLUMNS)
        row_seconds = tl.load(seconds + row, mask=row < end, other=0)
        column_seconds = tl.load(seconds + column, mask=column < end, other=0)
        elapsed = tl.maximum(row_seconds[:, None] - column_seconds[None, :], 0)  # [ROWS, COLUMNS]
        bucket = bucket_of(elapsed, thresholds, COUNT).to(tl.uint8)
        at = buckets + (tile0 + tile).to(tl.int64) * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
        tl.store(at, fragment_order(bucket, ROWS, COLUMNS))


def fill_buckets(buckets: Tensor, items: Tensor, offsets: Tensor, seconds: Tensor, thresholds: Tensor,
                 max_length: int, rows: int, columns: int) -> None:  # fmt: skip
    """Writes the time buckets of all tiles; seconds: int32 [total], thresholds: int32 [count]."""
    if len(items) and len(seconds):
        launch(
            bucket_kernel, (len(items), ceil_div(max_length, columns)), buckets, items, offsets, seconds, thresholds,
            len(thresholds), rows, columns, num_warps=rows // 16,
        )  # fmt: skip
