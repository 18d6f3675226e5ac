"""The HSTU encoder by our kernels against what torch does otherwise, in one run on one GPU.

8 layers, width 512, 4 heads x 128, bfloat16, bias of position and time, log-normal lengths; states of all rows unless
a row says 'newest rows'. Weights are random; times of events too, with pauses from seconds to weeks.
Median of repeated calls by device events, the second cache flushed before each. 'graph' rows include the copies into
the graph's inputs, the plan and the time buckets. tflops and gb_per_s count what must be done on packed rows, whoever
does it, and for rows that name a part those of the part alone.
max_error: ||states - reference|| / ||reference|| of the first layer's attention, gate included, against the fp32
specification on the same inputs, rounded to bfloat16; of FP8 rows it includes the rounding to FP8. states_error: an FP8
encoder's states against the bfloat16 one's.

usage: python -m tests.benchmarks.kernels [--out FOLDER] [--quick] [--tune]
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from kernels.fused_attention_layernorm.encoder import KernelEncoder
from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.fp8 import LARGEST, Fp8Scales
from kernels.fused_attention_layernorm.launch import SHORT, KernelConfig, attend, fits
from kernels.fused_attention_layernorm.op import fused_attention_layernorm, packed_reference
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import BatchGraphs, Bucket
from pipeline.backends.fused import encoder_of
from pipeline.features.event_features import TIME_THRESHOLDS
from pipeline.model.hstu import Hstu
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, graphed, median_ms, named, relative_error
from tests.benchmarks.kernel_work import CONFIG, HEADS, WIDTH, WORKLOADS, D, Work

SCALES = Fp8Scales(*[WIDTH**0.5 / LARGEST] * 3)  # as of weights of norm one, which `operator_inputs` look like
LAUNCHES = tuple(
    KernelConfig(*numbers)
    for numbers in (
        (64, 32, 2), (64, 32, 3), (64, 32, 2, 168), (64, 32, 3, 168), (64, 64, 2), (64, 64, 3), (64, 64, 2, 168),
        (128, 64, 2, 128), (128, 32, 3, 128),
    )
)  # fmt: skip
Rows = list[Row]


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


def operator_inputs(work: Work) -> tuple[Tensor, ...]:
    """q, k, v, u after SiLU, as slices of one product."""
    projected = F.silu(torch.randn(len(work.x), 4 * HEADS * D, device="cuda")).bfloat16()
    return tuple(part.unflatten(1, (HEADS, D)) for part in projected.split(HEADS * D, 1))


def narrowed(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k and v in FP8, over SCALES."""
    return tuple((part.float() / SCALES.q).to(FP8) for part in rows)


def error_of(hstu: Hstu, work: Work, plan: AttentionPlan, scales: Fp8Scales | None = None) -> float:
    """scales: in FP8."""
    layer: Any = hstu.layers[0]
    rows, eps, n = operator_inputs(work), CONFIG.eps, CONFIG.max_events
    held = (*narrowed(rows[:3]), rows[3]) if scales else rows
    tables = (layer.position_bias, layer.time_bias, layer.norm_out.weight, layer.norm_out.bias)
    found = fused_attention_layernorm(*held, *tables, plan, eps, n, scales=scales)
    worst = total = 0.0
    for user in range(min(work.users, 32)):  # the padded specification of all at once takes too much memory
        a, b = work.offsets[user : user + 2].tolist()
        one = (work.seconds[a:b], torch.tensor([0, b - a], device="cuda"), plan.thresholds, None, None)
        wanted = packed_reference(*(part[a:b].float() for part in rows), *tables, *one, eps, n, 1.0, 1.0, 0.0, 0)
        worst += float((found[a:b].float() - wanted).square().sum())
        total += float(wanted.square().sum())
    return float(f"{(worst / total) ** 0.5:.2e}")


def measure(hstu: Hstu, work: Work, thresholds: Tensor) -> Rows:
    encode, whole = encoder_of(hstu, torch.bfloat16), (work.seconds, work.offsets, thresholds, work.cap, torch.bfloat16)
    plan = AttentionPlan.from_batch(*whole)
    error = error_of(hstu, work, plan)
    graph, newest = (bucketed(encode, work, thresholds, last) for last in (False, True))
    fixed = graphed(lambda: encode(work.x, AttentionPlan.from_batch(*whole, trusted=True)))
    attention = attention_alone(tables_of(encode), plan, operator_inputs(work)[:3], Fp8Scales())
    encoder = (work.whole, error)
    return [
        work.measured("torch: eager, padded", padded(hstu, work, thresholds, False), work.whole),
        work.measured("torch: compiled, padded", padded(hstu, work, thresholds, True), work.whole),
        work.measured("cuBLAS: products alone", products_alone(work), work.products),
        work.measured(
            "kernels: eager", lambda: encode(work.x, AttentionPlan.from_batch(*whole, trusted=True)), *encoder
        ),
        work.measured("kernels: graph", graph, *encoder),
        work.measured("kernels: graph of this very size", fixed, *encoder),
        work.measured("kernels: graph, newest rows", newest),
        work.measured("kernels: attention alone", attention, work.attention, error),
        work.measured(
            "kernels: plan and time buckets alone", graphed(lambda: AttentionPlan.from_batch(*whole, trusted=True))
        ),
        *measure_fp8(hstu, work, thresholds, encode(work.x, plan)),
    ]


def measure_fp8(hstu: Hstu, work: Work, thresholds: Tensor, exact: Tensor) -> Rows:
    """exact: the states with Q, K and V in bfloat16. An encoder's states_error: how far FP8's are from those."""
    encode = encoder_of(hstu, torch.bfloat16, fp8=True)
    plan = AttentionPlan.from_batch(work.seconds, work.offsets, thresholds, work.cap, FP8)
    error = error_of(hstu, work, plan, SCALES)
    more = {"states_error": relative_error(encode(work.x, plan), exact)}
    graph, newest = (bucketed(encode, work, thresholds, last) for last in (False, True))
    attention = attention_alone(tables_of(encode), plan, narrowed(operator_inputs(work)[:3]), SCALES)
    flop, moved = work.attention  # one byte a value of Q, K and V
    return [
        work.measured("kernels: graph, FP8", graph, None, error, **more),
        work.measured("kernels: graph, newest rows, FP8", newest),
        work.measured("kernels: attention alone, FP8", attention, (flop, moved * 5 / 8), error),
    ]


def tables_of(encode: KernelEncoder) -> tuple[Tensor, Tensor]:
    return encode.layers[0].position_bias, encode.layers[0].time_bias


def attention_alone(
    tables: tuple[Tensor, Tensor], plan: AttentionPlan, rows: tuple[Tensor, ...], scales: Fp8Scales
) -> Callable[[], None]:
    """Of all layers. tables: of the biases; rows: q, k and v."""
    factors = (scales.q * scales.k, scales.v / CONFIG.max_events)

    def call() -> None:
        for _ in range(CONFIG.layers):
            attend(*rows, plan.offsets, None, plan.items, plan.buckets, *tables, *factors, 0, plan.launch)

    return graphed(call)


def bucketed(encode: KernelEncoder, work: Work, thresholds: Tensor, last: bool) -> Callable[[], Tensor]:
    """The graph of the work's bucket, and the copies into it."""

    def run(columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        x, seconds = columns
        dtype = encode.narrowed(x.dtype)
        return encode(x, AttentionPlan.from_batch(seconds, offsets, thresholds, longest, dtype, trusted=True), last)

    columns = (work.x, work.seconds)
    graphs = BatchGraphs(run, columns, work.users, len(work.x))
    graphs.capture(Bucket.of(work.users, len(work.x), work.cap))
    return lambda: graphs(columns, work.offsets, work.cap)


def tune(work: Work, thresholds: Tensor) -> None:
    """Prints every launch's time on this device, and the best one as the line that belongs into launch.LAUNCHES."""
    wide = operator_inputs(work)[:3]
    tables = (torch.randn(HEADS, CONFIG.max_events, device="cuda"), torch.randn(HEADS, 49, device="cuda"))
    for rows in (wide, narrowed(wide), tuple(part.float() for part in wide)):
        timed, size = [], rows[0].element_size()
        for launch in LAUNCHES:
            if not fits(launch, D, size, work.x.device):
                continue
            plan = AttentionPlan.from_batch(
                work.seconds, work.offsets, thresholds, work.cap, rows[0].dtype, launch=launch
            )
            timed.append(
                (float(do_bench(attention_alone(tables, plan, rows, Fp8Scales()), return_mode="median")), launch)
            )
        for ms, launch in sorted(timed, key=lambda pair: pair[0]):
            print(f"{work.name}: {ms / CONFIG.layers:.4f} ms a layer of {rows[0].dtype}, {launch}", flush=True)
        key = (torch.cuda.get_device_capability()[0], size, work.cap <= SHORT)
        print(f"    {key}: {min(timed, key=lambda pair: pair[0])[1]},", flush=True)


def main() -> None:
    args = arguments(
        __doc__,
        quick="run all once, to fill the compilers' caches; no file",
        tune="time the launches to choose from; no file",
    )
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
    found = {(each["workload"], each["implementation"]): median_ms(each) for each in rows}
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
