"""The product after attention with what surrounds it fused in, for inference: x + (U * LayerNorm(O)) W^T + b, and the
moments of the result's rows for the layer above.

The gate is applied to the rows on their way to the matrix units: O and U are read, and what lies between is never
written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.launch import precision, tiled
from kernels.fused_attention_layernorm.norm import normalisation
from kernels.fused_attention_layernorm.projection import SMALL_ROWS, Tiles
from kernels.launching import ceil_div, launch


@triton.jit
def gated_tile(
    attended, u, weight, gain, shift, mean, scale, row0, column0,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] of (U * LayerNorm(O)) W^T; descriptors: attended, u of [rows, WIDTH], weight of
    [columns, WIDTH]."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        at = first + tl.arange(0, DEPTH)
        inside = at < WIDTH
        normed = (attended.load([row0, first]).to(tl.float32) - mean[:, None]) * scale[:, None]
        gain_at, shift_at = tl.load(gain + at, mask=inside, other=0.0), tl.load(shift + at, mask=inside, other=0.0)
        gated = (normed * gain_at[None, :] + shift_at[None, :]) * u.load([row0, first]).to(tl.float32)
        w_tile = weight.load([column0, first])
        product = tl.dot(gated.to(w_tile.dtype), w_tile.T, product, input_precision=PRECISION)
    return product


@triton.jit
def gated_projection_kernel(
    attended, u, weight, gain, shift, attended_moments, bias, x, out, moments, rows, columns, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS tiles of columns. Descriptors as in `gated_tile`, x and out of [rows, columns]; attended_moments: float32
    [rows, HEADS, 2]; moments: float32 [rows, PARTS, 2], of the result."""
    tiles = PARTS * tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0, part = tile // PARTS * ROWS, tile % PARTS
        row, column = row0 + tl.arange(0, ROWS), part * COLUMNS + tl.arange(0, COLUMNS)
        mean, scale = normalisation(attended_moments, row.to(tl.int64), row < rows, eps, HEADS, WIDTH)
        product = gated_tile(
            attended, u, weight, gain, shift, mean, scale, row0, part * COLUMNS, WIDTH, ROWS, COLUMNS, DEPTH, PRECISION
        )
        below = tl.load(bias + column, mask=column < columns, other=0.0)
        result = product + below[None, :] + x.load([row0, part * COLUMNS]).to(tl.float32)
        result = tl.where((column < columns)[None, :], result, 0.0)
        out.store([row0, part * COLUMNS], result.to(out.dtype))
        moment_at = moments + (row.to(tl.int64) * PARTS + part) * 2
        tl.store(moment_at, tl.sum(result, 1), mask=row < rows)
        tl.store(moment_at + 1, tl.sum(result * result, 1), mask=row < rows)


LARGE = Tiles(128, 256, 64, 8, 3)
SMALL = Tiles(64, 64, 128, 4, 3)


def gated_projection(
    attended: Tensor, attended_moments: Tensor, u: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
    x: Tensor, eps: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attended [rows, k] and its moments [rows, heads, 2] as `attend` leaves them, u [rows, k] of any row stride, gain
    and shift [k] of the norm, weight [n, k], bias [n], x [rows, n] -> the new x [rows, n], and its moments."""
    (rows, width), columns = attended.shape, len(weight)
    tiles = (tiles or (LARGE if rows > SMALL_ROWS else SMALL)).within(width, columns)
    parts = ceil_div(columns, tiles.columns)
    out, moments = torch.empty_like(x), x.new_empty((rows, parts, 2), dtype=torch.float32)
    if rows:
        launch(
            gated_projection_kernel, tiles.grid(parts * ceil_div(rows, tiles.rows), x.device),
            tiled(attended, tiles.rows, tiles.depth), tiled(u, tiles.rows, tiles.depth),
            tiled(weight, tiles.columns, tiles.depth), gain, shift, attended_moments, bias,
            tiled(x, tiles.rows, tiles.columns), tiled(out, tiles.rows, tiles.columns), moments, rows, columns, eps,
            HEADS=attended_moments.shape[1], WIDTH=width, PARTS=parts, PRECISION=precision(x.dtype), **tiles.constants,
        )  # fmt: skip
    return out, moments
