"""The gate and the product after attention: in one launch, in two, and as the encoder chooses.

8 layers, width 512, 4 heads, bfloat16, replayed from one CUDA graph; median by device events, the second cache
flushed before each replay. tflops counts the product, gb_per_s each input once and the result. max_error: ||result -
reference|| / ||reference|| against float32 on the same rounded inputs.

usage: python -m tests.benchmarks.kernels_gated [--out FOLDER] [--tune]      (on a GPU)
"""

from collections.abc import Callable
from dataclasses import astuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from kernels.fused_attention_layernorm.gate_projection import LARGE, MIDDLE, project_gated, tiles_of
from kernels.fused_attention_layernorm.launch import normalise_and_gate
from kernels.fused_attention_layernorm.projection import ProjectionTiles, project_out
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, graphed, median_ms, named, ratio, relative_error, row

LAYERS, WIDTH, HEADS, EPS = 8, 512, 4, 1e-6
WORKLOADS = ((256, 74_108), (128, 20_000), (64, 5_601), (32, 2_300))  # users and their rows
TILES = (
    LARGE,
    MIDDLE,
    ProjectionTiles(64, 512, 32, 8, 3),
    ProjectionTiles(128, 256, 64, 8, 2),
    ProjectionTiles(128, 256, 32, 8, 3),
    ProjectionTiles(128, 256, 32, 8, 4),
    ProjectionTiles(128, 256, 64, 8, 2, programs=1),
    ProjectionTiles(64, 256, 64, 4, 3),
    ProjectionTiles(64, 256, 128, 4, 2),
    ProjectionTiles(64, 256, 64, 8, 3),
    ProjectionTiles(128, 128, 64, 8, 3),
    ProjectionTiles(64, 128, 128, 4, 3),
)
Answer = tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """What `project_gated` takes, in its order."""

    attended: Tensor
    attended_moments: Tensor
    u: Tensor
    gain: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    x: Tensor

    @classmethod
    def of(cls, rows: int, width: int, heads: int, columns: int, dtype: torch.dtype, device: torch.device) -> "Inputs":
        attended, x = (torch.randn(rows, size, device=device).to(dtype) for size in (width, columns))
        u = torch.randn(rows, 4 * width, device=device).to(dtype)[:, :width]  # a part of the product before attention
        parts = attended.float().unflatten(1, (heads, -1))
        moments = torch.stack([parts.sum(2), parts.square().sum(2)], 2).contiguous()
        gain, shift, bias = (torch.randn(size, device=device) for size in (width, width, columns))
        weight = (torch.randn(columns, width, device=device) / width**0.5).to(dtype)
        return cls(attended, moments, u, gain, shift, weight, bias, x)

    @property
    def needed(self) -> tuple[float, float]:
        """Operations and bytes of all layers."""
        rows, width, columns = len(self.x), self.attended.shape[1], len(self.weight)
        return LAYERS * 2.0 * rows * width * columns, LAYERS * 2.0 * rows * (2 * width + 2 * columns)

    def in_one(self, tiles: ProjectionTiles | None = None) -> Answer:
        """Without tiles: as the encoder chooses."""
        return project_gated(*self, EPS, tiles)

    def in_two(self) -> Answer:
        y = normalise_and_gate(self.attended, self.attended_moments, self.u, self.gain, self.shift, EPS)
        return project_out(y, self.weight, self.bias, self.x)

    def specified(self) -> Tensor:
        """In float32 throughout."""
        y = F.layer_norm(self.attended.float(), self.attended.shape[1:], self.gain, self.shift, EPS) * self.u.float()
        return self.x.float() + F.linear(y, self.weight.float(), self.bias)


def ms_of(call: Callable[[], object]) -> float:
    """Of all layers, by a CUDA graph."""

    def whole() -> None:
        for _ in range(LAYERS):
            call()

    return float(do_bench(graphed(whole), rep=200, return_mode="median"))


def measured(users: int, rows: int) -> dict[str, Row]:
    inputs = Inputs.of(rows, WIDTH, HEADS, WIDTH, torch.bfloat16, torch.device("cuda"))
    calls = {
        "two launches": inputs.in_two,
        "one launch": lambda: inputs.in_one(tiles_of(rows)),
        "chosen": inputs.in_one,
    }
    found, wanted = {}, inputs.specified()
    for name, call in calls.items():
        error = relative_error(call()[0], wanted)
        found[name] = row(f"{rows:,} rows, {LAYERS} layers", name, ms_of(call), users, inputs.needed, error)
    return found


def tune(rows: int) -> None:
    inputs = Inputs.of(rows, WIDTH, HEADS, WIDTH, torch.bfloat16, torch.device("cuda"))
    print(f"{rows}: two launches {ms_of(inputs.in_two):.4f} ms", flush=True)
    for tiles in TILES:
        try:
            ms = ms_of(lambda tiles=tiles: inputs.in_one(tiles))
        except (OutOfResources, PTXASError) as error:  # too much shared memory, too few registers
            print(f"{rows}: {astuple(tiles)}: {type(error).__name__}", flush=True)
            continue
        print(f"{rows}: {astuple(tiles)}: {ms:.4f} ms", flush=True)


def main() -> None:
    args = arguments(__doc__, tune="time the tiles to choose from; no file")
    torch.manual_seed(0)
    if args.tune:
        for _, rows in WORKLOADS:
            tune(rows)
        return
    found = [measured(*numbers) for numbers in WORKLOADS]
    one, two = found[0]["one launch"], found[0]["two launches"]
    metrics = {
        "large_one_launch_ms": median_ms(one),
        "large_two_launches_ms": median_ms(two),
        "large_speedup": round(ratio(two, one), 3),
    }
    rows = [each for of_rows in found for each in of_rows.values()]
    print(results.write(named("kernels_gated"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
