"""What the kernels' benchmarks have in common: their command line, a row of their results, the file that a card's
results go to, and what the card can do."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import results

Row = dict[str, results.Cell]


@dataclass(frozen=True, slots=True)
class Peak:
    """Datasheet of an SXM card: memory, matrix units in bfloat16 without sparsity, float32 units."""

    gb_per_s: float
    matrix_tflops: float
    float32_tflops: float


PEAKS = {"H100": Peak(3350, 989, 67), "H200": Peak(4800, 989, 67)}


def arguments(doc: str | None, **switches: str) -> argparse.Namespace:
    """--out, and switches, by their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    for name, meaning in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args()


def row(workload: str, implementation: str, ms: float, users: int, needed: tuple[float, float] | None,
        max_error: float | None, **more: results.Cell) -> Row:  # fmt: skip
    """Printed as it is measured. needed: operations and bytes; None where they are not counted."""
    made: Row = {
        "workload": workload,
        "implementation": implementation,
        "median_ms": round(ms, 4),
        "users_per_s": round(users / ms * 1e3),
        "tflops": round(needed[0] / ms / 1e9, 1) if needed else None,
        "gb_per_s": round(needed[1] / ms / 1e6, 1) if needed else None,
        "max_error": max_error,
        **more,
    }
    print(made, flush=True)
    return made


def median_ms(row: Row) -> float:
    ms = row["median_ms"]
    assert isinstance(ms, float), row
    return ms


def ratio(slow: Row, fast: Row) -> float:
    return median_ms(slow) / median_ms(fast)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, to three digits."""
    found, wanted = found.float(), wanted.float()
    return float(f"{float((found - wanted).norm() / wanted.norm()):.2e}")


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """The call by a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_ms(call: Callable[[], object], rounds: int) -> float:
    """The host's time to the end of the device's work: the median of all rounds but the first third."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[rounds // 3 :])


def named(stem: str) -> str:
    """`stem`_h200 or _h100: figures of two cards are never compared."""
    return f"{stem}_{'h200' if 'H200' in torch.cuda.get_device_name() else 'h100'}"
