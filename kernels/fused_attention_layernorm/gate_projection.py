"""The gate and the product after attention in one launch, for inference with many rows.

    project_gated:  x + (U * LayerNorm(O)) W^T + b, and the statistics of the result's rows

In one launch the gate is applied to the rows on their way to the matrix units, so U * LayerNorm(O) is neither written
nor read. Few rows are faster in two launches, `normalise_and_gate` and `project_out`, whose tiles may be small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.gate_norm import normalisation, normalise_and_gate
from kernels.fused_attention_layernorm.launch import HOPPER, ProjectionTiles, dot_precision, tile_descriptor
from kernels.fused_attention_layernorm.projection import project_out, store_residual
from kernels.launch import ceil_div, compute_capability, launch

# `python -m tests.benchmarks.kernels_gated`, on an H200: 74,108 rows and 8 layers take 1.21 ms, in two launches 1.28;
# 5,601 rows 0.132 and 0.138; 2,300 rows 0.120 in one launch, 0.115 in two.
MAX_ROWS_TWO_LAUNCHES = 4096  # more rows take one launch
MAX_ROWS_MIDDLE = 12_288  # up to this many rows use MIDDLE's deeper stages, more use LARGE
LARGE = ProjectionTiles(64, 512, 32, 8, 4)
MIDDLE = ProjectionTiles(64, 512, 64, 8, 2)


@triton.jit
def gated_matmul_tile(
    attn_out, u, weight, gain, shift, mean, scale, row0, column0,
    D_ATTN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return float32 [BLOCK_M, BLOCK_N] of (U * LayerNorm(O)) W^T.

    Descriptors: attn_out, u of [rows, D_ATTN], weight of [columns, D_ATTN].
    """
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, D_ATTN, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < D_ATTN
        normed = (attn_out.load([row0, first]).to(tl.float32) - mean[:, None]) * scale[:, None]
        gain_k = tl.load(gain + k, mask=inside, other=0.0)
        shift_k = tl.load(shift + k, mask=inside, other=0.0)
        gated = (normed * gain_k[None, :] + shift_k[None, :]) * u.load([row0, first]).to(tl.float32)
        w_tile = weight.load([column0, first])
        product = tl.dot(gated.to(w_tile.dtype), w_tile.T, product, input_precision=PRECISION)
    return product


@triton.jit
def project_gated_kernel(
    attn_out, u, weight, gain, shift, attn_row_stats, bias, x, out, row_stats, rows, columns, eps,
    HEADS: tl.constexpr, D_ATTN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write x + (U * LayerNorm(O)) W^T + b and its row statistics; a row has PARTS tiles of columns.

    Descriptors: see `gated_matmul_tile`; x and out of [rows, columns]. attn_row_stats: float32 [rows, HEADS, 2];
    row_stats: float32 [rows, PARTS, 2] of the result.
    """
    tiles = PARTS * tl.cdiv(rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0 = tile // PARTS * BLOCK_M
        part = tile % PARTS
        row = row0 + tl.arange(0, BLOCK_M)
        mean, scale = normalisation(attn_row_stats, row.to(tl.int64), row < rows, eps, HEADS, D_ATTN)
        product = gated_matmul_tile(
            attn_out, u, weight, gain, shift, mean, scale, row0, part * BLOCK_N, D_ATTN, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION,
        )  # fmt: skip
        store_residual(product, bias, x, out, row_stats, row0, part, rows, columns, PARTS, BLOCK_M, BLOCK_N)


def project_gated(
    attn_out: Tensor,
    attn_row_stats: Tensor,
    u: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    eps: float,
    tiles: ProjectionTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the new x [rows, n] and its row statistics.

    attn_out: [rows, k] and attn_row_stats: [rows, heads, 2] from `attend`; u: [rows, k], rows aligned to 16 bytes;
    gain, shift: [k] of the norm; weight: [n, k]; bias: [n]; x: [rows, n].
    tiles: of the single launch; by default it runs only where it was measured to be faster than two.
    """
    tiles = tiles or select_tiles(attn_out, x)
    if tiles is None:
        return project_out(normalise_and_gate(attn_out, attn_row_stats, u, gain, shift, eps), weight, bias, x)
    rows, width = attn_out.shape
    columns = len(weight)
    tiles = tiles.shrink_to(width, columns)
    parts = ceil_div(columns, tiles.block_n)
    out = torch.empty_like(x)
    row_stats = x.new_empty((rows, parts, 2), dtype=torch.float32)
    if rows:
        launch(
            project_gated_kernel, tiles.grid(parts * ceil_div(rows, tiles.block_m), x.device),
            tile_descriptor(attn_out, tiles.block_m, tiles.block_k), tile_descriptor(u, tiles.block_m, tiles.block_k),
            tile_descriptor(weight, tiles.block_n, tiles.block_k), gain, shift, attn_row_stats, bias,
            tile_descriptor(x, tiles.block_m, tiles.block_n), tile_descriptor(out, tiles.block_m, tiles.block_n),
            row_stats, rows, columns, eps, HEADS=attn_row_stats.shape[1], D_ATTN=width, PARTS=parts,
            PRECISION=dot_precision(x.dtype), **tiles.kernel_options,
        )  # fmt: skip
    return out, row_stats


def select_tiles(attn_out: Tensor, x: Tensor) -> ProjectionTiles | None:
    """Return the tiles of one launch; None where two launches are faster, or one was not measured."""
    on_hopper = compute_capability(x.device)[0] == HOPPER
    measured = on_hopper and x.shape[1] == LARGE.block_n
    if not measured or not attn_out.dtype == x.dtype == torch.bfloat16 or len(x) <= MAX_ROWS_TWO_LAUNCHES:
        return None
    return measured_tiles(len(x))


def measured_tiles(rows: int) -> ProjectionTiles:
    return LARGE if rows > MAX_ROWS_MIDDLE else MIDDLE
