"""The product before attention with its norm and activation, SiLU(LayerNorm(x) W^T + b), in five implementations.

8 layers with weights of their own, width 512 to 2,048, bfloat16, replayed from one CUDA graph. LayerNorm is computed
from the rows' sums and sums of squares, which are given in two parts, as the product of the layer below writes them.
Times are medians by device events, with the L2 cache flushed before each replay. tflops and gb_per_s count the
products' operations, and x, the weights and the result once. host_us: the host's time for one call outside of a graph.
max_error: ||result - reference|| / ||reference|| against float32 on the same rounded inputs. torch's cuBLASLt has the
epilogues bias, ReLU and GELU, but not this one, so a compiled kernel follows it.

usage: python -m tests.benchmarks.kernels_projection [--out FOLDER]      (a Hopper GPU with CuTe DSL)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.launch import LARGE_IN
from kernels.fused_attention_layernorm.projection import compute_row_stats, project_in
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
COLUMNS = 2048
EPS = 1e-5
WORKLOADS = ((256, 74_108), (64, 5_632))  # users and their rows, as in the encoder's benchmark
Layer = tuple[Tensor, Tensor, Tensor]  # weight [2048, 512], its row sums and the bias, both float32 [2048]
Call = Callable[..., Tensor]  # (x, row_stats, weight, weight_sums, bias) -> [rows, 2048]


@dataclass(frozen=True, slots=True)
class Work:
    """A workload. x: bfloat16 [rows, 512]; row_stats: float32 [rows, 2, 2], of the halves of each row."""

    users: int
    x: Tensor
    row_stats: Tensor
    layers: list[Layer]

    @classmethod
    def generate(cls, users: int, rows: int) -> "Work":
        x = torch.randn(rows, WIDTH, device="cuda").bfloat16()
        weights = [(torch.randn(COLUMNS, WIDTH, device="cuda") * WIDTH**-0.5).bfloat16() for _ in range(LAYERS)]
        layers = [(weight, weight.float().sum(1), torch.randn(COLUMNS, device="cuda")) for weight in weights]
        halves = x.view(2 * rows, WIDTH // 2)
        return cls(users, x, compute_row_stats(halves).view(rows, 2, 2), layers)

    @property
    def needed(self) -> tuple[float, float]:
        """Operations and bytes of all layers."""
        rows = len(self.x)
        moved = rows * (WIDTH + COLUMNS) + COLUMNS * WIDTH
        return LAYERS * 2.0 * rows * WIDTH * COLUMNS, LAYERS * 2.0 * moved

    def measured(self, implementation: str, call: Call, fused: bool = True) -> Row:
        """Measure the call. fused: with LayerNorm and SiLU, so that its result has an error."""
        inputs = (self.x, self.row_stats, *self.layers[0])
        error = relative_error(call(*inputs), specification(*inputs)) if fused else None
        ms = device_ms(self.graphed(call), warmup=30, rep=300)
        name = f"{len(self.x):,} rows, {LAYERS} layers"
        return row(name, implementation, ms, self.users, self.needed, error, host_us=round(self.host_us(call), 1))

    def graphed(self, call: Call) -> Callable[[], None]:
        def all_layers() -> None:
            for layer in self.layers:
                call(self.x, self.row_stats, *layer)

        return graphed(all_layers)

    def host_us(self, call: Call, calls: int = 50) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(self.x, self.row_stats, *self.layers[0])
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        return spent / calls * 1e6


def apply_epilogue(product: Tensor, row_stats: Tensor, weight_sums: Tensor, bias: Tensor) -> Tensor:
    """Apply norm, bias and SiLU to x W^T, [rows, 2048] in any dtype. Returns bfloat16."""
    total, squares = row_stats.sum(1).unbind(1)
    mean = total / WIDTH
    scale = torch.rsqrt((squares / WIDTH - mean * mean).clamp(min=0) + EPS)
    return F.silu((product.float() - mean[:, None] * weight_sums) * scale[:, None] + bias).bfloat16()


def unfused(x: Tensor, row_stats: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor) -> Tensor:
    return apply_epilogue(F.linear(x, weight), row_stats, weight_sums, bias)


def specification(x: Tensor, row_stats: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor) -> Tensor:
    """Return the result in float32 throughout."""
    normed = F.layer_norm(x.float(), (WIDTH,), eps=EPS)
    return F.silu(F.linear(normed, weight.float(), bias))


def implementations() -> dict[str, Call]:
    from kernels.fused_attention_layernorm import projection_hopper  # needs CuTe DSL, which --help does not

    epilogue = torch.compile(apply_epilogue, dynamic=False)
    compiled = torch.compile(unfused, dynamic=False, mode="max-autotune-no-cudagraphs")

    def then_epilogue(x: Tensor, row_stats: Tensor, weight: Tensor, weight_sums: Tensor, bias: Tensor) -> Tensor:
        return epilogue(F.linear(x, weight), row_stats, weight_sums, bias)

    return {
        "kernels: CuTe DSL": lambda *inputs: projection_hopper.project_in(*inputs, EPS),
        "kernels: Triton": lambda *inputs: project_in(*inputs, EPS, tiles=LARGE_IN),
        "torch: compiled, max-autotune": compiled,
        "cuBLASLt, then a compiled epilogue": then_epilogue,
    }


def measure(users: int, rows: int) -> dict[str, Row]:
    torch._dynamo.reset()
    work = Work.generate(users, rows)
    measured = {name: work.measured(name, call) for name, call in implementations().items()}
    alone = "cuBLASLt: product alone"
    measured[alone] = work.measured(alone, lambda x, row_stats, weight, *_: F.linear(x, weight), fused=False)
    return measured


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    large, middle = (measure(*numbers) for numbers in WORKLOADS)
    cute_row = large["kernels: CuTe DSL"]
    triton_row = large["kernels: Triton"]
    metrics = {
        "large_cute_ms": median_ms(cute_row),
        "large_triton_ms": median_ms(triton_row),
        "large_speedup_over_triton": round(ratio(triton_row, cute_row), 3),
    }
    rows = [*large.values(), *middle.values()]
    print(results.write(card_name("kernels_projection"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
