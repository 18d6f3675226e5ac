"""The product before attention with what is fused around it, SiLU(LayerNorm(x) W^T + b), by five implementations.

8 layers, each with weights of its own, width 512 to 2,048, bfloat16, replayed from one CUDA graph; LayerNorm comes from
the rows' moments, which are given in two parts, as the product of the layer below leaves them. Median by device events,
the second cache flushed before each replay. tflops and gb_per_s count the products' operations, and x, the weights and
the result once. host_us: what one call outside of a graph costs the host. max_error: ||result - reference|| /
||reference|| against float32 on the same rounded inputs. cuBLASLt through torch knows the epilogues bias, ReLU and
GELU, not this one: a compiled kernel follows it.

usage: python -m tests.benchmarks.kernels_projection [--out FOLDER]      (a Hopper GPU with CuTe DSL)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from kernels.fused_attention_layernorm import projection_hopper
from kernels.fused_attention_layernorm.projection import LARGE_IN, project_in, row_moments
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, graphed, median_ms, named, ratio, relative_error, row

LAYERS, WIDTH, COLUMNS, EPS = 8, 512, 2048, 1e-5
WORKLOADS = ((256, 74_108), (64, 5_632))  # users and their rows, as in the encoder's benchmark
Layer = tuple[Tensor, Tensor, Tensor]  # weight [2048, 512], its row sums and the bias, both float32 [2048]
Call = Callable[..., Tensor]  # (x, moments, weight, sums, bias) -> [rows, 2048]


@dataclass(frozen=True, slots=True)
class Work:
    """x: bfloat16 [rows, 512]; moments: float32 [rows, 2, 2], of the halves of each row."""

    users: int
    x: Tensor
    moments: Tensor
    layers: list[Layer]

    @classmethod
    def of(cls, users: int, rows: int) -> "Work":
        x = torch.randn(rows, WIDTH, device="cuda").bfloat16()
        weights = [(torch.randn(COLUMNS, WIDTH, device="cuda") * WIDTH**-0.5).bfloat16() for _ in range(LAYERS)]
        layers = [(weight, weight.float().sum(1), torch.randn(COLUMNS, device="cuda")) for weight in weights]
        halves = x.view(2 * rows, WIDTH // 2)
        return cls(users, x, row_moments(halves).view(rows, 2, 2), layers)

    @property
    def needed(self) -> tuple[float, float]:
        """Operations and bytes of all layers."""
        rows = len(self.x)
        moved = rows * (WIDTH + COLUMNS) + COLUMNS * WIDTH
        return LAYERS * 2.0 * rows * WIDTH * COLUMNS, LAYERS * 2.0 * moved

    def measured(self, implementation: str, call: Call, whole: bool = True) -> Row:
        """whole: LayerNorm and SiLU are in it."""
        given = (self.x, self.moments, *self.layers[0])
        error = relative_error(call(*given), specification(*given)) if whole else None
        ms = float(do_bench(self.graphed(call), warmup=30, rep=300, return_mode="median"))
        name = f"{len(self.x):,} rows, {LAYERS} layers"
        return row(name, implementation, ms, self.users, self.needed, error, host_us=round(self.host_us(call), 1))

    def graphed(self, call: Call) -> Callable[[], None]:
        def whole() -> None:
            for layer in self.layers:
                call(self.x, self.moments, *layer)

        return graphed(whole)

    def host_us(self, call: Call, calls: int = 50) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(self.x, self.moments, *self.layers[0])
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        return spent / calls * 1e6


def scaled(product: Tensor, moments: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """product: x W^T [rows, 2048] in any dtype -> SiLU(...) in bfloat16."""
    total, squares = moments.sum(1).unbind(1)
    mean = total / WIDTH
    scale = torch.rsqrt((squares / WIDTH - mean * mean).clamp(min=0) + EPS)
    return F.silu((product.float() - mean[:, None] * sums) * scale[:, None] + bias).bfloat16()


def expression(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    return scaled(F.linear(x, weight), moments, sums, bias)


def specification(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """float32 throughout."""
    normed = F.layer_norm(x.float(), (WIDTH,), eps=EPS)
    return F.silu(F.linear(normed, weight.float(), bias))


def implementations() -> dict[str, Call]:
    epilogue = torch.compile(scaled, dynamic=False)
    compiled = torch.compile(expression, dynamic=False, mode="max-autotune-no-cudagraphs")

    def in_two(x: Tensor, moments: Tensor, weight: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
        return epilogue(F.linear(x, weight), moments, sums, bias)

    return {
        "kernels: CuTe DSL": lambda *inputs: projection_hopper.project_in(*inputs, EPS),
        "kernels: Triton": lambda *inputs: project_in(*inputs, EPS, tiles=LARGE_IN),
        "torch: compiled, max-autotune": compiled,
        "cuBLASLt, then a compiled epilogue": in_two,
    }


def measure(users: int, rows: int) -> dict[str, Row]:
    torch._dynamo.reset()
    work = Work.of(users, rows)
    found = {name: work.measured(name, call) for name, call in implementations().items()}
    alone = "cuBLASLt: product alone"
    found[alone] = work.measured(alone, lambda x, moments, weight, sums, bias: F.linear(x, weight), whole=False)
    return found


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    large, middle = (measure(*numbers) for numbers in WORKLOADS)
    cute_row, triton_row = large["kernels: CuTe DSL"], large["kernels: Triton"]
    metrics = {
        "large_cute_ms": median_ms(cute_row),
        "large_triton_ms": median_ms(triton_row),
        "large_speedup_over_triton": round(ratio(triton_row, cute_row), 3),
    }
    rows = [*large.values(), *middle.values()]
    print(results.write(named("kernels_projection"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
