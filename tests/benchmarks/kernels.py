"""The HSTU encoder by our kernels against what torch does otherwise, in one run on one GPU.

8 layers, width 512, 4 heads x 128, bfloat16, bias of position and time, log-normal lengths; states of all rows unless
a row says 'newest rows'. Weights are random; times of events too, with pauses from seconds to weeks.
Median of repeated calls by device events, the second cache flushed before each. 'graph' rows include the copies into
the graph's inputs, the plan and the time buckets. tflops and gb_per_s count what must be done on packed rows, whoever
does it, and for rows that name a part those of the part alone.
max_error: ||states - reference|| / ||reference|| of the first layer's attention, gate included, against the fp32
specification on the same rounded inputs.

usage: python -m tests.benchmarks.kernels [--out FOLDER] [--quick] [--tune]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from kernels.fused_attention_layernorm.batch import Plan
from kernels.fused_attention_layernorm.encoder import Encoder, LayerWeights
from kernels.fused_attention_layernorm.launch import Launch, attend
from kernels.fused_attention_layernorm.op import fused_attention_layernorm, packed_reference
from kernels.graphs import BatchGraphs, Bucket
from pipeline.features import TIME_THRESHOLDS
from pipeline.hstu import Hstu
from pipeline.hstu_config import HstuConfig
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, named, row

CONFIG = HstuConfig(items=2, layers=8, width=512, heads=4, d_qk=128, d_v=128, max_events=1024)
HEADS, D, WIDTH = CONFIG.heads, CONFIG.d_qk, CONFIG.width
WORKLOADS = ((256, 290, 1024), (64, 88, 256), (1, 256, 256))  # users, mean and most events
LAUNCHES = tuple(
    Launch(*numbers)
    for numbers in (
        (64, 32, 2), (64, 32, 3), (64, 32, 2, 168), (64, 32, 3, 168), (64, 64, 2), (64, 64, 2, 168), (128, 64, 2, 128),
        (128, 32, 3, 128),
    )
)  # fmt: skip
Rows = list[Row]


@dataclass(frozen=True, slots=True)
class Work:
    """A batch. x: [tokens, width]; seconds: int32 [tokens]; offsets: int32 [users + 1]."""

    name: str
    cap: int
    x: Tensor
    seconds: Tensor
    offsets: Tensor
    quick: bool

    @classmethod
    def of(cls, users: int, mean: int, cap: int, quick: bool) -> "Work":
        random = np.random.default_rng(7)
        lengths = np.full(1, cap) if users == 1 else _lengths(random, users, mean, cap)
        offsets = np.concatenate([[0], lengths.cumsum()])
        pauses = np.exp(random.normal(4, 3, offsets[-1])).clip(0, 1e6).astype(np.int64)
        seconds = pauses.cumsum() - np.repeat((pauses.cumsum() - pauses)[offsets[:-1]], lengths)
        name = f"{users} users, mean {lengths.mean():.0f}, max {cap} ({offsets[-1]:,} tokens)"
        numbers = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in (seconds, offsets))
        return cls(name, cap, torch.randn(int(offsets[-1]), WIDTH, device="cuda").bfloat16(), *numbers, quick)

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def attention(self) -> tuple[float, float]:
        """Operations and bytes of attention in all layers: causal scores; Q, K, V read and the result written once."""
        lengths = self.offsets.diff().double()
        scores = float((lengths * (lengths + 1) / 2).sum())
        return CONFIG.layers * 4.0 * scores * HEADS * D, CONFIG.layers * 2.0 * len(self.x) * 4 * HEADS * D

    @property
    def products(self) -> tuple[float, float]:
        """Of the projections: their inputs, weights and results once."""
        flop, moved = 2.0 * len(self.x) * WIDTH * 5 * HEADS * D, 2.0 * len(self.x) * (2 * WIDTH + 5 * HEADS * D)
        return CONFIG.layers * flop, CONFIG.layers * (moved + 2.0 * WIDTH * 5 * HEADS * D)

    @property
    def whole(self) -> tuple[float, float]:
        """Of the encoder: as if nothing between two products, or a product and attention, left the chip twice."""
        flop, moved = (one + other for one, other in zip(self.attention, self.products, strict=True))
        return flop, moved + CONFIG.layers * 2.0 * len(self.x) * HEADS * D  # U is read once more

    def measured(
        self,
        implementation: str,
        call: Callable[[], object],
        needed: tuple[float, float] | None = None,
        max_error: float | None = None,
    ) -> Row:
        """needed: operations and bytes; None where they are not counted."""
        rep = 1 if self.quick else 200
        ms = float(do_bench(call, warmup=1 if self.quick else 30, rep=rep, return_mode="median"))
        return row(self.name, implementation, ms, self.users, needed, max_error)


def _lengths(random: np.random.Generator, users: int, mean: int, cap: int) -> np.ndarray:
    """Log-normal, cut at the cap, scaled until the mean is met."""
    drawn = random.lognormal(0, 0.8, users)
    scale = float(mean)
    for _ in range(50):
        lengths = np.clip(drawn * scale / drawn.mean(), 1, cap)
        scale *= mean / lengths.mean()
    return np.clip(drawn * scale / drawn.mean(), 1, cap).astype(np.int64)


def encoder_of(hstu: Hstu) -> Encoder:
    layers: list[Any] = list(hstu.layers)
    weights = [
        LayerWeights.of(
            layer.norm_in, layer.project_in, layer.norm_out, layer.project_out, layer.position_bias, layer.time_bias,
            torch.bfloat16,
        )
        for layer in layers
    ]  # fmt: skip
    return Encoder(weights, HEADS, D, CONFIG.d_v, CONFIG.max_events, CONFIG.eps)


def padded_layer(layer: Any, x: Tensor, distance: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
    """x: [users, length, width], as one would write it in torch; buckets: int64 [users, length, length]."""
    projected = F.silu(layer.project_in(layer.norm_in(x)))
    u, q, v, k = projected.split(layer.sizes, dim=2)
    q, k, v = (part.unflatten(2, (HEADS, D)).transpose(1, 2) for part in (q, k, v))  # [users, heads, length, d]
    bias = layer.position_bias[:, distance] + layer.time_bias[:, buckets].transpose(0, 1)
    weights = F.silu(q @ k.transpose(2, 3) + bias) * (mask / CONFIG.max_events)
    attended = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return x + layer.project_out(layer.norm_out(attended) * u)


def padded(hstu: Hstu, work: Work, thresholds: Tensor, compiled: bool) -> Callable[[], Tensor]:
    """The whole encoder on padded rows, the time buckets of the batch included."""
    half = Hstu(CONFIG).to("cuda", torch.bfloat16).requires_grad_(False)
    half.load_state_dict(hstu.state_dict())
    lengths = work.offsets.diff().long()
    slots = torch.arange(int(lengths.max()), device="cuda")
    rows = (work.offsets[:-1].long()[:, None] + slots).clamp(max=len(work.x) - 1)
    mask = (slots[:, None] >= slots).bfloat16()
    distance = (slots[:, None] - slots).clamp(min=0)
    layer_of = torch.compile(padded_layer, dynamic=False) if compiled else padded_layer

    def call() -> Tensor:
        seconds = work.seconds[rows]
        elapsed = (seconds[:, :, None] - seconds[:, None, :]).clamp(min=0)
        buckets = torch.bucketize(elapsed, thresholds, right=True)
        x = work.x[rows]
        for layer in half.layers:
            x = layer_of(layer, x, distance, buckets, mask)
        return x

    return call


def products_alone(work: Work) -> Callable[[], None]:
    """What cuBLAS needs for the projections of all layers."""
    rows, wide = work.x, torch.randn(len(work.x), HEADS * D, device="cuda").bfloat16()
    into, out = (torch.randn(n, 512, device="cuda").bfloat16() for n in (4 * HEADS * D, WIDTH))

    def call() -> None:
        for _ in range(CONFIG.layers):
            torch.mm(rows, into.T)
            torch.mm(wide, out.T)

    return graphed(call)


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def operator_inputs(work: Work) -> tuple[Tensor, ...]:
    """q, k, v, u after SiLU, as slices of one product."""
    projected = F.silu(torch.randn(len(work.x), 4 * HEADS * D, device="cuda")).bfloat16()
    return tuple(part.unflatten(1, (HEADS, D)) for part in projected.split(HEADS * D, 1))


def error_of(hstu: Hstu, work: Work, plan: Plan) -> float:
    layer: Any = hstu.layers[0]
    rows, eps, n = operator_inputs(work), CONFIG.eps, CONFIG.max_events
    tables = (layer.position_bias, layer.time_bias, layer.norm_out.weight, layer.norm_out.bias)
    found = fused_attention_layernorm(*rows, *tables, plan, eps, n)
    worst = total = 0.0
    for user in range(min(work.users, 32)):  # the padded specification of all at once takes too much memory
        a, b = work.offsets[user : user + 2].tolist()
        one = (work.seconds[a:b], torch.tensor([0, b - a], device="cuda"), plan.thresholds, None, None)
        wanted = packed_reference(*(part[a:b].float() for part in rows), *tables, *one, eps, n, 1.0, 0.0, 0)
        worst += float((found[a:b].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return (worst / total) ** 0.5


def measure(hstu: Hstu, work: Work, thresholds: Tensor) -> Rows:
    encode, whole = encoder_of(hstu), (work.seconds, work.offsets, thresholds, work.cap, torch.bfloat16)
    plan = Plan.of(*whole)
    error = float(f"{error_of(hstu, work, plan):.2e}")
    graph, newest = (bucketed(encode, work, thresholds, last) for last in (False, True))
    fixed = graphed(lambda: encode(work.x, Plan.of(*whole, trusted=True)))
    rows = operator_inputs(work)[:3]
    layer = encode.layers[0]
    tables = (layer.position_bias, layer.time_bias, 1.0, 1.0 / CONFIG.max_events, 0, plan.launch)

    def attention() -> None:
        for _ in range(CONFIG.layers):
            attend(*rows, plan.offsets, None, plan.items, plan.buckets, *tables)

    encoder = (work.whole, error)
    return [
        work.measured("torch: eager, padded", padded(hstu, work, thresholds, False), work.whole),
        work.measured("torch: compiled, padded", padded(hstu, work, thresholds, True), work.whole),
        work.measured("cuBLAS: products alone", products_alone(work), work.products),
        work.measured("kernels: eager", lambda: encode(work.x, Plan.of(*whole, trusted=True)), *encoder),
        work.measured("kernels: graph", graph, *encoder),
        work.measured("kernels: graph of this very size", fixed, *encoder),
        work.measured("kernels: graph, newest rows", newest),
        work.measured("kernels: attention alone", graphed(attention), work.attention, error),
        work.measured("kernels: plan and time buckets alone", graphed(lambda: Plan.of(*whole, trusted=True))),
    ]


def bucketed(encode: Encoder, work: Work, thresholds: Tensor, last: bool) -> Callable[[], Tensor]:
    """The graph of the work's bucket, and the copies into it."""

    def run(columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        x, seconds = columns
        return encode(x, Plan.of(seconds, offsets, thresholds, longest, x.dtype, trusted=True), last)

    columns = (work.x, work.seconds)
    graphs = BatchGraphs(run, columns, work.users, len(work.x))
    graphs.capture(Bucket.of(work.users, len(work.x), work.cap))
    return lambda: graphs(columns, work.offsets, work.cap)


def tune(work: Work, thresholds: Tensor) -> None:
    """Prints every launch's time on this device; the best ones belong into launch.LAUNCHES."""
    rows = operator_inputs(work)[:3]
    tables = (torch.randn(HEADS, CONFIG.max_events, device="cuda"), torch.randn(HEADS, 49, device="cuda"))
    timed = []
    for launch in LAUNCHES:
        plan = Plan.of(work.seconds, work.offsets, thresholds, work.cap, torch.bfloat16, launch=launch)
        batch = (plan.offsets, None, plan.items, plan.buckets)
        call = graphed(lambda batch=batch, launch=launch: attend(*rows, *batch, *tables, 1.0, 1.0 / 1024, 0, launch))
        timed.append((float(do_bench(call, return_mode="median")), launch))
    for ms, launch in sorted(timed, key=lambda pair: pair[0]):
        print(f"{work.name}: {ms:.4f} ms a layer, {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--quick", action="store_true", help="run all once, to fill the compilers' caches; no file")
    parser.add_argument("--tune", action="store_true", help="time the launches to choose from; no file")
    args = parser.parse_args()
    torch.manual_seed(0)
    thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device="cuda")
    hstu = Hstu(CONFIG).to("cuda").requires_grad_(False).eval()
    for layer in hstu.layers:
        for table in (layer.position_bias, layer.time_bias):
            torch.nn.init.normal_(table)  # type: ignore[arg-type]  # a parameter
    works = [Work.of(*numbers, quick=args.quick) for numbers in WORKLOADS]
    if args.tune:
        for work in works:
            tune(work, thresholds)
        return
    rows = [each for work in works for each in measure(hstu, work, thresholds)]
    found = {(each["workload"], each["implementation"]): float(each["median_ms"]) for each in rows}
    metrics = {}
    for short, work in zip(("large", "middle", "single"), works, strict=True):
        graph = found[work.name, "kernels: graph"]
        metrics[f"{short}_ms"] = graph
        metrics[f"{short}_newest_ms"] = found[work.name, "kernels: graph, newest rows"]
        metrics[f"{short}_speedup_over_eager"] = round(found[work.name, "torch: eager, padded"] / graph, 2)
        metrics[f"{short}_speedup_over_compiled"] = round(found[work.name, "torch: compiled, padded"] / graph, 2)
    if not args.quick:
        print(results.write(named("kernels"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
