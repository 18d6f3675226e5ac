"""The gate and the product after attention: in one launch, in two launches, and as the encoder chooses.

8 layers, width 512, 4 heads, bfloat16, replayed from one CUDA graph. Times are medians by device events, with the L2
cache flushed before each replay. tflops counts the product, gb_per_s each input and the result once. max_error:
||result - reference|| / ||reference|| against float32 on the same rounded inputs.

usage: python -m tests.benchmarks.kernels_gated [--out FOLDER] [--tune]      (on a GPU)
"""

from collections.abc import Callable
from dataclasses import astuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from kernels.fused_attention_layernorm.gate_norm import normalise_and_gate
from kernels.fused_attention_layernorm.gate_projection import LARGE, MIDDLE, measured_tiles, project_gated
from kernels.fused_attention_layernorm.launch import ProjectionTiles
from kernels.fused_attention_layernorm.projection import project_out
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import (
    Row,
    arguments,
    card_name,
    device_ms,
    graphed,
    median_ms,
    ratio,
    relative_error,
    row,
)

LAYERS = 8
WIDTH = 512
HEADS = 4
EPS = 1e-6
WORKLOADS = ((256, 74_108), (128, 20_000), (64, 5_601), (32, 2_300))  # users and their rows
TILES = (
    LARGE,
    MIDDLE,
    ProjectionTiles(64, 512, 32, 8, 3),
    ProjectionTiles(128, 256, 64, 8, 2),
    ProjectionTiles(128, 256, 32, 8, 3),
    ProjectionTiles(128, 256, 32, 8, 4),
    ProjectionTiles(128, 256, 64, 8, 2, programs_per_sm=1),
    ProjectionTiles(64, 256, 64, 4, 3),
    ProjectionTiles(64, 256, 128, 4, 2),
    ProjectionTiles(64, 256, 64, 8, 3),
    ProjectionTiles(128, 128, 64, 8, 3),
    ProjectionTiles(64, 128, 128, 4, 3),
)
Product = tuple[Tensor, Tensor]  # the result, and its rows' sums and sums of squares


class Inputs(NamedTuple):
    """Arguments of `project_gated`, in its order."""

    attn_out: Tensor
    row_stats: Tensor
    u: Tensor
    gain: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    x: Tensor

    @classmethod
    def generate(cls, rows: int, width: int, heads: int, columns: int, dtype: torch.dtype) -> "Inputs":
        attn_out, x = (torch.randn(rows, size, device="cuda").to(dtype) for size in (width, columns))
        u = torch.randn(rows, 4 * width, device="cuda").to(dtype)[:, :width]  # a slice of the product before attention
        parts = attn_out.float().unflatten(1, (heads, -1))
        row_stats = torch.stack([parts.sum(2), parts.square().sum(2)], 2).contiguous()
        gain, shift, bias = (torch.randn(size, device="cuda") for size in (width, width, columns))
        weight = (torch.randn(columns, width, device="cuda") / width**0.5).to(dtype)
        return cls(attn_out, row_stats, u, gain, shift, weight, bias, x)

    @property
    def needed(self) -> tuple[float, float]:
        """Operations and bytes of all layers."""
        rows = len(self.x)
        width = self.attn_out.shape[1]
        columns = len(self.weight)
        return LAYERS * 2.0 * rows * width * columns, LAYERS * 2.0 * rows * (2 * width + 2 * columns)

    def one_launch(self, tiles: ProjectionTiles | None = None) -> Product:
        """Run one launch with these tiles; None: as the encoder chooses."""
        return project_gated(*self, EPS, tiles)

    def two_launches(self) -> Product:
        y = normalise_and_gate(self.attn_out, self.row_stats, self.u, self.gain, self.shift, EPS)
        return project_out(y, self.weight, self.bias, self.x)

    def reference(self) -> Tensor:
        """Return the result in float32 throughout."""
        y = F.layer_norm(self.attn_out.float(), self.attn_out.shape[1:], self.gain, self.shift, EPS) * self.u.float()
        return self.x.float() + F.linear(y, self.weight.float(), self.bias)


def measure_ms(call: Callable[[], object]) -> float:
    """Return the time of all layers from a CUDA graph."""

    def all_layers() -> None:
        for _ in range(LAYERS):
            call()

    return device_ms(graphed(all_layers), rep=200)


def measure(users: int, rows: int) -> dict[str, Row]:
    inputs = Inputs.generate(rows, WIDTH, HEADS, WIDTH, torch.bfloat16)
    calls = {
        "two launches": inputs.two_launches,
        "one launch": lambda: inputs.one_launch(measured_tiles(rows)),
        "chosen": inputs.one_launch,
    }
    expected = inputs.reference()
    measured: dict[str, Row] = {}
    for name, call in calls.items():
        error = relative_error(call()[0], expected)
        measured[name] = row(f"{rows:,} rows, {LAYERS} layers", name, measure_ms(call), users, inputs.needed, error)
    return measured


def tune(rows: int) -> None:
    """Print the time of two launches, and of one with each choice of tiles."""
    inputs = Inputs.generate(rows, WIDTH, HEADS, WIDTH, torch.bfloat16)
    print(f"{rows}: two launches {measure_ms(inputs.two_launches):.4f} ms", flush=True)
    for tiles in TILES:
        try:
            ms = measure_ms(lambda tiles=tiles: inputs.one_launch(tiles))
        except (OutOfResources, PTXASError) as error:  # too much shared memory, too few registers
            print(f"{rows}: {astuple(tiles)}: {type(error).__name__}", flush=True)
            continue
        print(f"{rows}: {astuple(tiles)}: {ms:.4f} ms", flush=True)


def main() -> None:
    args = arguments(__doc__, tune="time the choices of tiles; writes no file")
    torch.manual_seed(0)
    if args.tune:
        for _, rows in WORKLOADS:
            tune(rows)
        return
    measured = [measure(*numbers) for numbers in WORKLOADS]
    one = measured[0]["one launch"]
    two = measured[0]["two launches"]
    metrics = {
        "large_one_launch_ms": median_ms(one),
        "large_two_launches_ms": median_ms(two),
        "large_speedup": round(ratio(two, one), 3),
    }
    rows = [each for by_name in measured for each in by_name.values()]
    print(results.write(card_name("kernels_gated"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
