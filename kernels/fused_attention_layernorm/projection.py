"""The matrix products beside attention with what surrounds them fused in, for inference.

    project_in:   SiLU(LayerNorm(x) W^T + b)                  before attention: U, V, Q and K in one product
    project_out:  x + (U * LayerNorm(O)) W^T + b              after it, and the moments of the result's rows

LayerNorm before a product needs no pass of its own: with gain g and shift s of the norm,
    LayerNorm(x) W^T + b = r * (x (g W)^T - mean * sum_k(g W)) + (W s + b),      r = 1 / deviation
so that the product runs on x itself and the rows' moments enter afterwards (`folded`).
"""

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.gate_norm import normalisation
from kernels.fused_attention_layernorm.kernel import silu
from kernels.fused_attention_layernorm.launch import HOPPER, given, padded, precision, tiled
from kernels.launch import SHARED_BYTES, ceil_div, launch, shared_bytes_of


def folded(
    weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, k], bias [n], gain and shift [k] of the norm before -> g W in `dtype`, its row sums, W s + b."""
    weight, bias, gain, shift = (part.detach().float() for part in (weight, bias, gain, shift))
    scaled = (weight * gain).to(dtype)
    return scaled, scaled.float().sum(1), weight @ shift + bias


@triton.jit
def moments_kernel(x, moments, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """x: [rows, WIDTH] -> float32 [rows, 1, 2]: sum and sum of squares of each row."""
    row, column = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP), tl.arange(0, BLOCK)
    kept = (row < rows)[:, None] & (column < WIDTH)[None, :]
    value = tl.load(x + row[:, None] * WIDTH + column[None, :], mask=kept, other=0.0).to(tl.float32)
    tl.store(moments + row * 2, tl.sum(value, 1), mask=row < rows)
    tl.store(moments + row * 2 + 1, tl.sum(value * value, 1), mask=row < rows)


@triton.jit
def product_tile(a, weight, row0, column0, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """float32 [ROWS, COLUMNS] of a W^T; a: descriptor of [rows, WIDTH], weight: of [columns, WIDTH]."""
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        a_tile, w_tile = a.load([row0, first]), weight.load([column0, first])
        product = tl.dot(a_tile, w_tile.T, product, input_precision=PRECISION)
    return product


@triton.jit
def store_narrow(out8, factors, result, row0, column0, columns, SPLIT: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns from `column0` on, times their factors, in FP8; out8 begins with column SPLIT."""
    column = column0 + tl.arange(0, COLUMNS)
    factor = tl.load(factors + column, mask=column < columns, other=0.0)
    out8.store([row0, column0 - SPLIT], (result * factor[None, :]).to(out8.dtype))


@triton.jit
def project_in_kernel(
    x, weight, out, out8, moments, weight_sums, bias, factors, rows, columns, eps,
    SPLIT: tl.constexpr, FP8: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of the same rows run together and share them in the second cache.

    Descriptors: x of [rows, WIDTH], weight of [columns, WIDTH], folded, out of [rows, columns]; moments: float32
    [rows, PARTS, 2]. With FP8 `out` takes the first SPLIT columns and out8 the others, times `factors` [columns].
    """
    wide = tl.cdiv(columns, COLUMNS)
    tiles = wide * tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0, column0 = tile // wide * ROWS, tile % wide * COLUMNS
        row, column = row0 + tl.arange(0, ROWS), column0 + tl.arange(0, COLUMNS)
        product = product_tile(x, weight, row0, column0, WIDTH, ROWS, COLUMNS, DEPTH, PRECISION)
        mean, scale = normalisation(moments, row.to(tl.int64), row < rows, eps, PARTS, WIDTH)
        sums = tl.load(weight_sums + column, mask=column < columns, other=0.0)
        shift = tl.load(bias + column, mask=column < columns, other=0.0)
        result = silu((product - mean[:, None] * sums[None, :]) * scale[:, None] + shift[None, :], FAST)
        if not FP8:
            out.store([row0, column0], result.to(out.dtype))
        elif SPLIT == 0:
            store_narrow(out8, factors, result, row0, column0, columns, SPLIT, COLUMNS)
        elif column0 < SPLIT:
            out.store([row0, column0], result.to(out.dtype))
        else:
            store_narrow(out8, factors, result, row0, column0, columns, SPLIT, COLUMNS)


@triton.jit
def store_sum(
    product, bias, x, out, moments, row0, part, rows, columns,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x + product + bias of a tile, and the moments of its part of each row."""
    row, column = row0 + tl.arange(0, ROWS), part * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(bias + column, mask=column < columns, other=0.0)
    result = product + shift[None, :] + x.load([row0, part * COLUMNS]).to(tl.float32)
    result = tl.where((column < columns)[None, :], result, 0.0)
    out.store([row0, part * COLUMNS], result.to(out.dtype))
    moment_at = moments + (row.to(tl.int64) * PARTS + part) * 2
    tl.store(moment_at, tl.sum(result, 1), mask=row < rows)
    tl.store(moment_at + 1, tl.sum(result * result, 1), mask=row < rows)


@triton.jit
def project_out_kernel(
    y, weight, bias, x, out, moments, rows, columns,
    WIDTH: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS tiles of columns. Descriptors: y of [rows, WIDTH], weight of [columns, WIDTH], x and out of
    [rows, columns]; moments: float32 [rows, PARTS, 2], of the result."""
    tiles = PARTS * tl.cdiv(rows, ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):  # type: ignore[misc]  # Triton's
        row0, part = tile // PARTS * ROWS, tile % PARTS
        product = product_tile(y, weight, row0, part * COLUMNS, WIDTH, ROWS, COLUMNS, DEPTH, PRECISION)
        store_sum(product, bias, x, out, moments, row0, part, rows, columns, PARTS, ROWS, COLUMNS)


SPARE_BYTES = 2048  # of shared memory, for what the compiler adds


@dataclass(frozen=True, slots=True)
class ProjectionTiles:
    """A product's tile: rows x columns of the result, `depth` of the inner side at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0
    programs: int = 0  # a multiprocessor, each taking many tiles; 0: one program a tile

    def grid(self, tiles: int, device: torch.device) -> tuple[int]:
        if not self.programs:
            return (tiles,)
        return (min(tiles, self.programs * torch.cuda.get_device_properties(device).multi_processor_count),)

    def within(self, width: int, columns: int, split: int = 0) -> "ProjectionTiles":
        """No deeper than the inner side, no wider than the result, and none across column `split` of it."""
        columns = min(self.columns, padded(columns), split & -split if split else self.columns)
        return replace(self, depth=min(self.depth, padded(width)), columns=columns)

    def shared_bytes(self, element_bytes: int) -> int:
        """No program takes more: both factors in every stage, a tile of x and one of the result."""
        factors = self.stages * (self.rows + self.columns) * self.depth
        return (factors + 2 * self.rows * self.columns) * element_bytes + SPARE_BYTES

    @property
    def constants(self) -> dict[str, int]:
        tile = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "FLATTEN": self.programs > 0}
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return tile | options | ({"maxnreg": self.registers} if self.registers else {})


# Of 76,727 rows, 8 layers, on an H100: in 2.73 ms, with 128 x 128 tiles 3.0 to 3.9; out 0.95 ms, 1.1 to 1.2.
LARGE_IN, LARGE_OUT = ProjectionTiles(128, 256, 64, 8, 3, programs=1), ProjectionTiles(128, 256, 64, 8, 3)
SMALL = ProjectionTiles(64, 64, 128, 4, 3)  # 256 rows: 0.039 ms, the large ones 0.083
# These take up to 209 KiB on 9.0 and 64 on 8.0, in half precision; float32 has the small ones, not measured. Where
# there is less, the following, not measured either: at most 68 KiB of 99 (compiled for 8.6, 9.0 and 12.0).
NARROW = ProjectionTiles(64, 64, 64, 4, 2)
ROOMY_BYTES = SHARED_BYTES[8, 0]
# Above, projection_hopper.py's kernel wins: 600 rows 0.061 ms (with two groups), SMALL 0.074; 256: 0.059, 0.039.
HOPPER_ROWS = 512
SMALL_ROWS = 2048  # below, large tiles would leave multiprocessors without work


def tiles_for(rows: int, large: ProjectionTiles, element_bytes: int, available_bytes: int) -> ProjectionTiles:
    """available_bytes: of shared memory, for a program."""
    if element_bytes > 2:
        return SMALL if SMALL.shared_bytes(element_bytes) <= available_bytes else NARROW
    if available_bytes < ROOMY_BYTES:
        return NARROW
    return large if rows > SMALL_ROWS else SMALL


def row_moments(x: Tensor) -> Tensor:
    """[rows, width] -> float32 [rows, 1, 2]: sums and sums of squares."""
    rows, width = x.shape
    moments = x.new_empty((rows, 1, 2), dtype=torch.float32)
    group = max(1, 4096 // padded(width))
    if rows:
        launch(moments_kernel, (ceil_div(rows, group),), x, moments, rows, width, padded(width), group, num_warps=4)
    return moments


@cache
def hopper_kernels(device: torch.device) -> ModuleType | None:
    """`project_in` in CuTe DSL (docs/adr/0002), on a GPU that has what it needs and where the package is installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return None
    try:
        from kernels.fused_attention_layernorm import projection_hopper
    except ImportError:
        return None
    return projection_hopper


def project_in(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, eps: float,
               tiles: ProjectionTiles | None = None) -> Tensor:  # fmt: skip
    """x [rows, k], its moments, and `folded`'s weight [n, k], sums [n] and bias [n] -> SiLU(...) [rows, n].

    tiles: of the Triton kernel; without them the faster kernel for this device and shape is chosen.
    """
    hopper = hopper_kernels(x.device) if tiles is None and len(x) > HOPPER_ROWS else None
    if hopper and hopper.fits(x, weight):
        return hopper.project_in(x, moments, weight, sums, bias, eps)
    out = x.new_empty((len(x), len(weight)))
    fill_in(out, None, None, x, moments, weight, sums, bias, eps, tiles)
    return out


def project_in_fp8(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor, factors: Tensor, split: int,
                   eps: float, tiles: ProjectionTiles | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `project_in` -> the first `split` columns [rows, split], a multiple of 16, and the others in FP8, times
    `factors` [n]."""
    if split and len(x) > SMALL_ROWS and tiles is None:  # both results of a large tile take too much shared memory
        out = project_in(x, moments, weight[:split], sums[:split], bias[:split], eps)
        rest = (weight[split:], sums[split:], bias[split:], factors[split:])
        return out, project_in_fp8(x, moments, *rest, 0, eps)[1]
    out = x.new_empty((len(x), split))
    out8 = x.new_empty((len(x), len(weight) - split), dtype=FP8)
    fill_in(out, out8, factors, x, moments, weight, sums, bias, eps, tiles)
    return out, out8


def fill_in(out: Tensor, out8: Tensor | None, factors: Tensor | None, x: Tensor, moments: Tensor, weight: Tensor,
            sums: Tensor, bias: Tensor, eps: float, tiles: ProjectionTiles | None) -> None:  # fmt: skip
    (rows, width), columns, split = x.shape, len(weight), out.shape[1]
    tiles = tiles or tiles_for(rows, LARGE_IN, x.element_size(), shared_bytes_of(x.device))
    tiles = tiles.within(width, columns, 0 if out8 is None else split)
    wide, narrow = out if split else out8, out if out8 is None else out8
    if rows and wide is not None:
        count = ceil_div(columns, tiles.columns) * ceil_div(rows, tiles.rows)
        launch(
            project_in_kernel, tiles.grid(count, x.device),
            tiled(x, tiles.rows, tiles.depth), tiled(weight, tiles.columns, tiles.depth),
            tiled(wide, tiles.rows, tiles.columns), tiled(narrow, tiles.rows, tiles.columns), moments, sums, bias,
            given(factors, bias), rows, columns, eps, SPLIT=split, FP8=out8 is not None, PARTS=moments.shape[1],
            WIDTH=width, FAST=x.is_cuda and x.dtype != torch.float32, PRECISION=precision(x.dtype), **tiles.constants,
        )  # fmt: skip


def project_out(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor,
                tiles: ProjectionTiles | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [rows, k], weight [n, k], bias [n], x [rows, n] -> x + y W^T + b [rows, n], and its moments."""
    (rows, width), columns = y.shape, len(weight)
    tiles = tiles or tiles_for(rows, LARGE_OUT, x.element_size(), shared_bytes_of(x.device))
    tiles = tiles.within(width, columns)
    parts = ceil_div(columns, tiles.columns)
    out, moments = torch.empty_like(x), x.new_empty((rows, parts, 2), dtype=torch.float32)
    if rows:
        launch(
            project_out_kernel, tiles.grid(parts * ceil_div(rows, tiles.rows), x.device),
            tiled(y, tiles.rows, tiles.depth), tiled(weight, tiles.columns, tiles.depth), bias,
            tiled(x, tiles.rows, tiles.columns), tiled(out, tiles.rows, tiles.columns), moments, rows, columns,
            WIDTH=width, PARTS=parts, PRECISION=precision(x.dtype), **tiles.constants,
        )  # fmt: skip
    return out, moments
