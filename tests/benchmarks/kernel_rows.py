"""Common parts of the kernels' benchmarks: command line, result rows and files, timing, the cards' peaks."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks import results

Row = dict[str, results.Cell]


@dataclass(frozen=True, slots=True)
class Peak:
    """Datasheet of an SXM card: memory bandwidth, matrix units in bfloat16 without sparsity, float32 units."""

    gb_per_s: float
    matrix_tflops: float
    float32_tflops: float


PEAKS = {"H100": Peak(3350, 989, 67), "H200": Peak(4800, 989, 67)}


def arguments(doc: str | None, **switches: str) -> argparse.Namespace:
    """Parse --out and the switches, given by name with their help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result")
    for name, meaning in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args()


def row(
    workload: str,
    implementation: str,
    ms: float,
    users: int,
    needed: tuple[float, float] | None,
    max_error: float | None,
    **more: results.Cell,
) -> Row:
    """Return a row, and print it. needed: operations and bytes, None if they are not counted."""
    measured: Row = {
        "workload": workload,
        "implementation": implementation,
        "median_ms": round(ms, 4),
        "users_per_s": round(users / ms * 1e3),
        "tflops": round(needed[0] / ms / 1e9, 1) if needed else None,
        "gb_per_s": round(needed[1] / ms / 1e6, 1) if needed else None,
        "max_error": max_error,
        **more,
    }
    print(measured, flush=True)
    return measured


def median_ms(row: Row) -> float:
    ms = row["median_ms"]
    assert isinstance(ms, float), row
    return ms


def ratio(slow: Row, fast: Row) -> float:
    return median_ms(slow) / median_ms(fast)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return ||got - expected|| / ||expected||, to three digits."""
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    return float(f"{float(error):.2e}")


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Capture the call as a CUDA graph and return its replay, which keeps the tensors that the call refers to."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    """Replay the call's graph. NOTE: the graph holds addresses alone, so `call` must live as long."""
    graph.replay()


def device_ms(call: Callable[[], object], warmup: int = 25, rep: int = 100) -> float:
    """Return the median by device events, with the L2 cache flushed before each call. warmup, rep: milliseconds."""
    from triton.testing import do_bench  # the pictures use this module without it

    ms = do_bench(call, warmup=warmup, rep=rep, return_mode="median")
    assert isinstance(ms, float)
    return ms


def host_ms(call: Callable[[], object], rounds: int) -> float:
    """Return the host's time to the end of the device's work: the median over all rounds but the first third."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[rounds // 3 :])


def card_name(stem: str) -> str:
    """Return `stem`_h200 or `stem`_h100: figures of two cards are never compared."""
    return f"{stem}_{'h200' if 'H200' in torch.cuda.get_device_name() else 'h100'}"
