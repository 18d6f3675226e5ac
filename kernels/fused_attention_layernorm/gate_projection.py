"""The gate and the product after attention, for inference: of many rows in one launch.

    project_gated:  x + (U * LayerNorm(O)) W^T + b, and the moments of the result's rows

In one launch the gate is applied to the rows on their way to the matrix units, so that U * LayerNorm(O) is neither
written nor read. Few rows are faster in two, `normalise_and_gate` and `project_out`: their tiles may be small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.gate_norm import normalisation
from kernels.fused_attention_layernorm.launch import HOPPER, normalise_and_gate, precision, tiled
from kernels.fused_attention_layernorm.projection import ProjectionTiles, project_out, store_sum
from kernels.launch import ceil_div, launch

# By `python -m tests.benchmarks.kernels_gated`, on an H100: of 74,108 rows and 8 layers 1.28 ms, in two launches 1.53;
# of 5,601 rows 0.138 and 0.146; of 2,300 in one launch 0.125, in two 0.120.
MANY, MOST = 4096, 12_288  # from more rows on, one launch; deeper stages
LARGE, MIDDLE = ProjectionTiles(64, 512, 32, 8, 4), ProjectionTiles(64, 512, 64, 8, 2)


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
def project_gated_kernel(
    attended, u, weight, gain, shift, attended_moments, bias, x, out, moments, rows, columns, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS tiles of columns. Descriptors as in `gated_tile`, x and out of [rows, columns]; attended_moments: float32
    [rows, HEADS, 2]; moments: float32 [rows, PARTS, 2], of the result."""
    tiles = PARTS * tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0, part = tile // PARTS * ROWS, tile % PARTS
        row = row0 + tl.arange(0, ROWS)
        mean, scale = normalisation(attended_moments, row.to(tl.int64), row < rows, eps, HEADS, WIDTH)
        product = gated_tile(
            attended, u, weight, gain, shift, mean, scale, row0, part * COLUMNS, WIDTH, ROWS, COLUMNS, DEPTH, PRECISION
        )
        store_sum(product, bias, x, out, moments, row0, part, rows, columns, PARTS, ROWS, COLUMNS)


def project_gated(
    attended: Tensor, attended_moments: Tensor, u: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
    x: Tensor, eps: float, tiles: ProjectionTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attended [rows, k] and its moments [rows, heads, 2] as `attend` leaves them, u [rows, k], rows at multiples of 16
    bytes, gain and shift [k] of the norm, weight [n, k], bias [n], x [rows, n] -> the new x [rows, n], and its moments.

    tiles: of the one launch; without them it is taken where it is known to be faster.
    """
    tiles = tiles or tiles_for(attended, x)
    if tiles is None:
        return project_out(normalise_and_gate(attended, attended_moments, u, gain, shift, eps), weight, bias, x)
    (rows, width), columns = attended.shape, len(weight)
    tiles = tiles.within(width, columns)
    parts = ceil_div(columns, tiles.columns)
    out, moments = torch.empty_like(x), x.new_empty((rows, parts, 2), dtype=torch.float32)
    if rows:
        launch(
            project_gated_kernel, tiles.grid(parts * ceil_div(rows, tiles.rows), x.device),
            tiled(attended, tiles.rows, tiles.depth), tiled(u, tiles.rows, tiles.depth),
            tiled(weight, tiles.columns, tiles.depth), gain, shift, attended_moments, bias,
            tiled(x, tiles.rows, tiles.columns), tiled(out, tiles.rows, tiles.columns), moments, rows, columns, eps,
            HEADS=attended_moments.shape[1], WIDTH=width, PARTS=parts, PRECISION=precision(x.dtype), **tiles.constants,
        )  # fmt: skip
    return out, moments


def tiles_for(attended: Tensor, x: Tensor) -> ProjectionTiles | None:
    """Of one launch; None where two are faster, or it has not been measured."""
    measured = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == HOPPER and x.shape[1] == LARGE.columns
    if not measured or not attended.dtype == x.dtype == torch.bfloat16 or len(x) <= MANY:
        return None
    return tiles_of(len(x))


def tiles_of(rows: int) -> ProjectionTiles:
    return LARGE if rows > MOST else MIDDLE
