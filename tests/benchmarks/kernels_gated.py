"""A variant that is in no use yet: the gate and the product after attention in one launch.

    x + (U * LayerNorm(O)) W^T + b, and the moments of the result's rows

The gate is applied to the rows on their way to the matrix units: O and U are read, and what lies between is never
written, 150 MB a layer of 74,108 rows. Whether that pays is what this measures, against the two launches in use:

    python -m tests.benchmarks.kernels_gated       on a GPU; prints a line a tile, no file
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from kernels.fused_attention_layernorm.launch import normalise_and_gate, precision, tiled
from kernels.fused_attention_layernorm.norm import normalisation
from kernels.fused_attention_layernorm.projection import (
    LARGE_OUT,
    SMALL_ROWS,
    Tiles,
    project_out,
    shared_bytes_of,
    tiles_for,
)
from kernels.launching import ceil_div, launch
from tests.benchmarks.kernel_rows import graphed

LAYERS, WIDTH, HEADS, EPS = 8, 512, 4, 1e-6
LARGE_TILES = (
    Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 2), Tiles(128, 256, 64, 8, 4), Tiles(128, 256, 32, 8, 4),
    Tiles(128, 256, 64, 8, 3, programs=1), Tiles(64, 512, 64, 8, 2), Tiles(64, 512, 32, 8, 3),
    Tiles(128, 512, 32, 16, 3), Tiles(128, 512, 64, 16, 2), Tiles(64, 256, 64, 4, 3), Tiles(64, 256, 128, 4, 2),
    Tiles(64, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(64, 128, 128, 4, 3),
)  # fmt: skip
SMALL_TILES = (
    Tiles(64, 64, 128, 4, 3), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 128, 4, 2),
    Tiles(64, 256, 64, 4, 3), Tiles(64, 64, 128, 8, 3), Tiles(64, 32, 128, 4, 3), Tiles(128, 128, 64, 8, 3),
)  # fmt: skip


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


def gated_projection(
    attended: Tensor, attended_moments: Tensor, u: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
    x: Tensor, eps: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attended [rows, k] and its moments [rows, heads, 2] as `attend` leaves them, u [rows, k] of any row stride, gain
    and shift [k] of the norm, weight [n, k], bias [n], x [rows, n] -> the new x [rows, n], and its moments."""
    (rows, width), columns = attended.shape, len(weight)
    tiles = (tiles or tiles_for(rows, LARGE_OUT, shared_bytes_of(x.device))).within(width, columns)
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


def two_launches(
    attended: Tensor, attended_moments: Tensor, u: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor,
    x: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the encoder has it."""
    return project_out(normalise_and_gate(attended, attended_moments, u, gain, shift, eps), weight, bias, x)


def inputs_of(rows: int, width: int, heads: int, columns: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """What `gated_projection` takes, up to x."""
    attended, x = torch.randn(rows, width, device=device).to(dtype), torch.randn(rows, columns, device=device).to(dtype)
    u = torch.randn(rows, 4 * width, device=device).to(dtype)[:, :width]  # a part of the product before attention
    parts = attended.float().unflatten(1, (heads, -1))
    moments = torch.stack([parts.sum(2), parts.square().sum(2)], 2).contiguous()
    gain, shift, bias = (torch.randn(size, device=device) for size in (width, width, columns))
    weight = (torch.randn(columns, width, device=device) / width**0.5).to(dtype)
    return attended, moments, u, gain, shift, weight, bias, x


def ms_of(call: Callable[[], object]) -> float:
    """Of all layers, by a CUDA graph."""

    def whole() -> None:
        for _ in range(LAYERS):
            call()

    return float(do_bench(graphed(whole), return_mode="median"))


def main() -> None:
    torch.manual_seed(0)
    for rows in (74_108, 5_601, 256):
        given = inputs_of(rows, WIDTH, HEADS, WIDTH, torch.bfloat16, "cuda")
        print(f"{rows}: two launches {ms_of(lambda given=given: two_launches(*given, EPS)):.4f} ms", flush=True)
        for tiles in LARGE_TILES if rows > SMALL_ROWS else SMALL_TILES:
            try:
                ms = ms_of(lambda given=given, tiles=tiles: gated_projection(*given, EPS, tiles))
            except (OutOfResources, PTXASError) as error:  # too much shared memory, too few registers
                print(f"{rows}: {tiles}: {str(error)[:80]}", flush=True)
                continue
            print(f"{rows}: {tiles}: {ms:.4f} ms", flush=True)


if __name__ == "__main__":
    main()
