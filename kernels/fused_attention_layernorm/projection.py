"""The matrix products before and after attention with the operations around them fused in, for inference.

    project_in:   SiLU(LayerNorm(x) W^T + b)                  before attention: U, V, Q and K in one product
    project_out:  x + (U * LayerNorm(O)) W^T + b              after it, and the statistics of the result's rows

LayerNorm before a product needs no pass of its own: with gain g and shift s of the norm,
    LayerNorm(x) W^T + b = r * (x (g W)^T - mean * sum_k(g W)) + (W s + b),      r = 1 / deviation
so the product runs on x itself and the row statistics enter afterwards (`fold_norm`). Row statistics are the sum and
the sum of squares of each part of a row: float32 [rows, parts, 2].
"""

from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.gate_norm import normalisation
from kernels.fused_attention_layernorm.kernel import silu
from kernels.fused_attention_layernorm.launch import (
    HOPPER,
    HOPPER_ROWS,
    LARGE_IN,
    LARGE_OUT,
    ROW_TILE_VALUES,
    ProjectionTiles,
    can_use_ptx,
    dot_precision,
    padded_width,
    projection_tiles_for,
    tile_descriptor,
)
from kernels.launch import ceil_div, compute_capability, launch, max_shared_bytes


def fold_norm(
    weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return g W in `dtype`, its row sums, and W s + b.

    weight: [n, k]; bias: [n]; gain, shift: [k] of the norm before the product.
    """
    weight, bias, gain, shift = (part.detach().float() for part in (weight, bias, gain, shift))
    scaled = (weight * gain).to(dtype)
    return scaled, scaled.float().sum(1), weight @ shift + bias


@triton.jit
def row_stats_kernel(x, row_stats, rows, D_MODEL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write row_stats, float32 [rows, 1, 2], of x [rows, D_MODEL]. Grid (rows / BLOCK_M)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D_MODEL)[None, :]
    value = tl.load(x + row[:, None] * D_MODEL + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(row_stats + row * 2, tl.sum(value, 1), mask=row < rows)
    tl.store(row_stats + row * 2 + 1, tl.sum(value * value, 1), mask=row < rows)


@triton.jit
def matmul_tile(
    a, weight, row0, column0,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return float32 [BLOCK_M, BLOCK_N] of a W^T; a: descriptor of [rows, K], weight: of [columns, K]."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = a.load([row0, k])
        w_tile = weight.load([column0, k])
        product = tl.dot(a_tile, w_tile.T, product, input_precision=PRECISION)
    return product


@triton.jit
def project_in_kernel(
    x, weight, out, row_stats, weight_sums, bias, rows, columns, eps,
    PARTS: tl.constexpr, D_MODEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
    USE_PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write SiLU(LayerNorm(x) W^T + b). Tiles of the same rows run together and share them in the L2 cache.

    Descriptors: x of [rows, D_MODEL], weight of [columns, D_MODEL] from `fold_norm`, out of [rows, columns].
    row_stats: [rows, PARTS, 2].
    """
    row_tiles = tl.cdiv(columns, BLOCK_N)  # tiles per block of rows
    tiles = row_tiles * tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0 = tile // row_tiles * BLOCK_M
        column0 = tile % row_tiles * BLOCK_N
        row = row0 + tl.arange(0, BLOCK_M)
        column = column0 + tl.arange(0, BLOCK_N)
        product = matmul_tile(x, weight, row0, column0, D_MODEL, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        mean, scale = normalisation(row_stats, row.to(tl.int64), row < rows, eps, PARTS, D_MODEL)
        sums = tl.load(weight_sums + column, mask=column < columns, other=0.0)
        shift = tl.load(bias + column, mask=column < columns, other=0.0)
        result = silu((product - mean[:, None] * sums[None, :]) * scale[:, None] + shift[None, :], USE_PTX)
        out.store([row0, column0], result.to(out.dtype))


@triton.jit
def store_residual(
    product, bias, x, out, row_stats, row0, part, rows, columns,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store x + product + bias of a tile, and the statistics of its part of each row."""
    row = row0 + tl.arange(0, BLOCK_M)
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    shift = tl.load(bias + column, mask=column < columns, other=0.0)
    result = product + shift[None, :] + x.load([row0, part * BLOCK_N]).to(tl.float32)
    result = tl.where((column < columns)[None, :], result, 0.0)
    out.store([row0, part * BLOCK_N], result.to(out.dtype))
    stats_pointers = row_stats + (row.to(tl.int64) * PARTS + part) * 2
    tl.store(stats_pointers, tl.sum(result, 1), mask=row < rows)
    tl.store(stats_pointers + 1, tl.sum(result * result, 1), mask=row < rows)


@triton.jit
def project_out_kernel(
    y, weight, bias, x, out, row_stats, rows, columns,
    D_ATTN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write x + y W^T + b and its row statistics; a row has PARTS tiles of columns.

    Descriptors: y of [rows, D_ATTN], weight of [columns, D_ATTN], x and out of [rows, columns]. row_stats: [rows,
    PARTS, 2] of the result.
    """
    tiles = PARTS * tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0 = tile // PARTS * BLOCK_M
        part = tile % PARTS
        product = matmul_tile(y, weight, row0, part * BLOCK_N, D_ATTN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        store_residual(product, bias, x, out, row_stats, row0, part, rows, columns, PARTS, BLOCK_M, BLOCK_N)


def compute_row_stats(x: Tensor) -> Tensor:
    """Return the row statistics of x [rows, width]: float32 [rows, 1, 2]."""
    rows, width = x.shape
    row_stats = x.new_empty((rows, 1, 2), dtype=torch.float32)
    block_m = max(1, ROW_TILE_VALUES // padded_width(width))
    if rows:
        launch(
            row_stats_kernel, (ceil_div(rows, block_m),), x, row_stats, rows, width, padded_width(width), block_m,
            num_warps=4,
        )  # fmt: skip
    return row_stats


@cache
def import_projection_hopper(device: torch.device) -> ModuleType | None:
    """Return the module with `project_in` in CuTe DSL (docs/adr/0002); None on other GPUs or without the package."""
    if compute_capability(device)[0] != HOPPER:
        return None
    try:
        from kernels.fused_attention_layernorm import projection_hopper
    except ImportError:
        return None
    return projection_hopper


def project_in(
    x: Tensor,
    row_stats: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor,
    eps: float,
    tiles: ProjectionTiles | None = None,
) -> Tensor:
    """Return SiLU(LayerNorm(x) W^T + b) [rows, n].

    x: [rows, k] and its row statistics; weight: [n, k], sums: [n], bias: [n] from `fold_norm`.
    tiles: of the Triton kernel; by default the faster kernel for this device and shape runs.
    """
    hopper = import_projection_hopper(x.device) if tiles is None and len(x) > HOPPER_ROWS else None
    if hopper and hopper.fits(x, weight):
        return hopper.project_in(x, row_stats, weight, sums, bias, eps)
    out = x.new_empty((len(x), len(weight)))
    rows, width = x.shape
    columns = len(weight)
    tiles = tiles or projection_tiles_for(rows, LARGE_IN, x.element_size(), max_shared_bytes(x.device))
    tiles = tiles.shrink_to(width, columns)
    if rows:
        launch(
            project_in_kernel, tiles.grid(ceil_div(columns, tiles.block_n) * ceil_div(rows, tiles.block_m), x.device),
            tile_descriptor(x, tiles.block_m, tiles.block_k), tile_descriptor(weight, tiles.block_n, tiles.block_k),
            tile_descriptor(out, tiles.block_m, tiles.block_n), row_stats, sums, bias, rows, columns, eps,
            PARTS=row_stats.shape[1], D_MODEL=width, USE_PTX=can_use_ptx(x), PRECISION=dot_precision(x.dtype),
            **tiles.kernel_options,
        )  # fmt: skip
    return out


def project_out(
    y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, tiles: ProjectionTiles | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + y W^T + b [rows, n] and its row statistics. y: [rows, k]; weight: [n, k]; bias: [n]; x: [rows, n]."""
    rows, width = y.shape
    columns = len(weight)
    tiles = tiles or projection_tiles_for(rows, LARGE_OUT, x.element_size(), max_shared_bytes(x.device))
    tiles = tiles.shrink_to(width, columns)
    parts = ceil_div(columns, tiles.block_n)
    out = torch.empty_like(x)
    row_stats = x.new_empty((rows, parts, 2), dtype=torch.float32)
    if rows:
        launch(
            project_out_kernel, tiles.grid(parts * ceil_div(rows, tiles.block_m), x.device),
            tile_descriptor(y, tiles.block_m, tiles.block_k), tile_descriptor(weight, tiles.block_n, tiles.block_k),
            bias, tile_descriptor(x, tiles.block_m, tiles.block_n), tile_descriptor(out, tiles.block_m, tiles.block_n),
            row_stats, rows, columns, D_ATTN=width, PARTS=parts, PRECISION=dot_precision(x.dtype),
            **tiles.kernel_options,
        )  # fmt: skip
    return out, row_stats
