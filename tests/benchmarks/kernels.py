"""The HSTU encoder on this project's kernels against torch, in one run on one GPU.

8 layers, width 512, 4 heads x 128, bfloat16, biases of time and position, log-normal lengths; states of all rows unless
a row says 'newest rows'. Weights are random, and so are times of events, with pauses from seconds to weeks.
Times are medians of repeated calls by device events, with the L2 cache flushed before each. 'graph' rows include the
copies into the graph's inputs, the plan and the time buckets. tflops and gb_per_s count the operations and bytes that
are needed on packed rows, whatever the implementation does; for rows that name a part, those of the part.
max_error: ||states - reference|| / ||reference|| of the first layer's attention with its gate, against the fp32
specification on the same inputs, rounded to bfloat16.

usage: python -m tests.benchmarks.kernels [--out FOLDER] [--quick] [--tune]      (on a GPU)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.encoder import KernelEncoder
from kernels.fused_attention_layernorm.fallback import packed_reference
from kernels.fused_attention_layernorm.launch import SHORT_LENGTH, KernelConfig, attend, fits
from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import BatchGraphs, Bucket
from pipeline.backends.fused import make_kernel_encoder
from pipeline.features.event_features import TIME_THRESHOLDS
from pipeline.model.hstu import Hstu
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, card_name, device_ms, graphed, median_ms
from tests.benchmarks.kernel_work import CONFIG, HEADS, WIDTH, WORKLOADS, D, Work

CONFIGS = (
    KernelConfig(64, 32, 2),
    KernelConfig(64, 32, 3),
    KernelConfig(64, 32, 2, 168),
    KernelConfig(64, 32, 3, 168),
    KernelConfig(64, 64, 2),
    KernelConfig(64, 64, 3),
    KernelConfig(64, 64, 2, 168),
    KernelConfig(128, 64, 2, 128),
    KernelConfig(128, 32, 3, 128),
)
Rows = list[Row]


def padded_layer(layer: Any, x: Tensor, distance: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
    """Compute a layer on padded rows, written plainly in torch.

    x: [users, length, width]; buckets: int64 [users, length, length]
    """
    projected = F.silu(layer.project_in(layer.norm_in(x)))
    u, q, v, k = projected.split(layer.sizes, dim=2)
    q, k, v = (part.unflatten(2, (HEADS, D)).transpose(1, 2) for part in (q, k, v))  # [users, heads, length, d]
    bias = layer.position_bias[:, distance] + layer.time_bias[:, buckets].transpose(0, 1)
    weights = F.silu(q @ k.transpose(2, 3) + bias) * (mask / CONFIG.max_events)
    attn_out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return x + layer.project_out(layer.norm_out(attn_out) * u)


def padded(hstu: Hstu, work: Work, thresholds: Tensor, compiled: bool) -> Callable[[], Tensor]:
    """Return a call of the full encoder on padded rows, including the batch's time buckets."""
    half = Hstu(CONFIG).to("cuda", torch.bfloat16).requires_grad_(False)
    half.load_state_dict(hstu.state_dict())
    lengths = work.offsets.diff().long()
    slots = torch.arange(int(lengths.max()), device="cuda")
    rows = (work.offsets[:-1].long()[:, None] + slots).clamp(max=len(work.x) - 1)
    mask = (slots[:, None] >= slots).bfloat16()
    distance = (slots[:, None] - slots).clamp(min=0)
    run_layer = torch.compile(padded_layer, dynamic=False) if compiled else padded_layer

    def call() -> Tensor:
        seconds = work.seconds[rows]
        elapsed = (seconds[:, :, None] - seconds[:, None, :]).clamp(min=0)
        buckets = torch.bucketize(elapsed, thresholds, right=True)
        x = work.x[rows]
        for layer in half.layers:
            x = run_layer(layer, x, distance, buckets, mask)
        return x

    return call


def products_alone(work: Work) -> Callable[[], None]:
    """Return a call of cuBLAS for the projections of all layers."""
    attn_out = torch.randn(len(work.x), HEADS * D, device="cuda").bfloat16()
    weight_in, weight_out = (torch.randn(n, 512, device="cuda").bfloat16() for n in (4 * HEADS * D, WIDTH))

    def call() -> None:
        for _ in range(CONFIG.layers):
            torch.mm(work.x, weight_in.T)
            torch.mm(attn_out, weight_out.T)

    return graphed(call)


def operator_inputs(work: Work) -> tuple[Tensor, ...]:
    """Return q, k, v and u after SiLU, as slices of one product."""
    projected = F.silu(torch.randn(len(work.x), 4 * HEADS * D, device="cuda")).bfloat16()
    return tuple(part.unflatten(1, (HEADS, D)) for part in projected.split(HEADS * D, 1))


def operator_error(hstu: Hstu, work: Work, plan: AttentionPlan) -> float:
    """Return the first layer's max_error."""
    layer: Any = hstu.layers[0]
    eps = CONFIG.eps
    n = CONFIG.max_events
    rows = operator_inputs(work)
    tables = (layer.position_bias, layer.time_bias, layer.norm_out.weight, layer.norm_out.bias)
    got = fused_attention_layernorm(*rows, *tables, plan, eps, n)
    squared_error = 0.0
    squared_norm = 0.0
    for user in range(min(work.users, 32)):  # the padded specification of all users together takes too much memory
        a, b = work.offsets[user : user + 2].tolist()
        one = (work.seconds[a:b], torch.tensor([0, b - a], device="cuda"), plan.thresholds, None)
        expected = packed_reference(*(part[a:b].float() for part in rows), *tables, *one, eps, n, 1.0, 0.0, 0)
        squared_error += float((got[a:b].float() - expected).square().sum())
        squared_norm += float(expected.square().sum())
    return float(f"{(squared_error / squared_norm) ** 0.5:.2e}")


def measure(hstu: Hstu, work: Work, thresholds: Tensor) -> Rows:
    encode = make_kernel_encoder(hstu, torch.bfloat16)

    def make_plan() -> AttentionPlan:
        batch = (work.seconds, work.offsets, thresholds, work.max_length, torch.bfloat16)
        return AttentionPlan.from_batch(*batch, trusted=True)

    plan = AttentionPlan.from_batch(work.seconds, work.offsets, thresholds, work.max_length, torch.bfloat16)
    error = operator_error(hstu, work, plan)
    graph, newest = (bucket_graph(encode, work, thresholds, last) for last in (False, True))
    exact_size = graphed(lambda: encode(work.x, make_plan()))
    attention = attention_alone(bias_tables(encode), plan, operator_inputs(work)[:3])
    encoder = (work.encoder, error)
    return [
        work.measured("torch: eager, padded", padded(hstu, work, thresholds, False), work.encoder),
        work.measured("torch: compiled, padded", padded(hstu, work, thresholds, True), work.encoder),
        work.measured("cuBLAS: products alone", products_alone(work), work.products),
        work.measured("kernels: eager", lambda: encode(work.x, make_plan()), *encoder),
        work.measured("kernels: graph", graph, *encoder),
        work.measured("kernels: graph of this very size", exact_size, *encoder),
        work.measured("kernels: graph, newest rows", newest),
        work.measured("kernels: attention alone", attention, work.attention, error),
        work.measured("kernels: plan and time buckets alone", graphed(make_plan)),
    ]


def bias_tables(encode: KernelEncoder) -> tuple[Tensor, Tensor]:
    return encode.layers[0].position_bias, encode.layers[0].time_bias


def attention_alone(tables: tuple[Tensor, Tensor], plan: AttentionPlan, rows: tuple[Tensor, ...]) -> Callable[[], None]:
    """Return a graph of attention in all layers. tables: of the biases; rows: q, k and v."""
    factors = (1.0, 1.0 / CONFIG.max_events)

    def call() -> None:
        for _ in range(CONFIG.layers):
            attend(*rows, plan.offsets, plan.row_blocks, plan.time_buckets, *tables, *factors, 0, plan.config)

    return graphed(call)


def bucket_graph(encode: KernelEncoder, work: Work, thresholds: Tensor, last: bool) -> Callable[[], Tensor]:
    """Return a call of the graph of the work's bucket, with the copies into it. last: of the latest rows alone."""

    def run(columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        x, seconds = columns
        return encode(x, AttentionPlan.from_batch(seconds, offsets, thresholds, longest, x.dtype, trusted=True), last)

    columns = (work.x, work.seconds)
    graphs = BatchGraphs(run, columns, work.users, len(work.x))
    graphs.capture(Bucket.from_sizes(work.users, len(work.x), work.max_length))
    return lambda: graphs(columns, work.offsets, work.max_length)


def tune(work: Work, thresholds: Tensor) -> None:
    """Print every configuration's time on this device, and the best one as its line of launch.KERNEL_CONFIGS."""
    qkv = operator_inputs(work)[:3]
    tables = (torch.randn(HEADS, CONFIG.max_events, device="cuda"), torch.randn(HEADS, 49, device="cuda"))
    for rows in (qkv, tuple(part.float() for part in qkv)):
        dtype = rows[0].dtype
        timed: list[tuple[float, KernelConfig]] = []
        for config in CONFIGS:
            if not fits(config, D, dtype.itemsize, work.x.device):
                continue
            plan = AttentionPlan.from_batch(
                work.seconds, work.offsets, thresholds, work.max_length, dtype, config=config
            )
            call = attention_alone(tables, plan, rows)
            timed.append((device_ms(call), config))
        timed.sort(key=lambda pair: pair[0])
        for ms, config in timed:
            print(f"{work.name}: {ms / CONFIG.layers:.4f} ms per layer of {dtype}, {config}", flush=True)
        key = (torch.cuda.get_device_capability()[0], dtype.itemsize, work.max_length <= SHORT_LENGTH)
        print(f"    {key}: {timed[0][1]},", flush=True)


def main() -> None:
    args = arguments(
        __doc__,
        quick="run everything once, to fill the compilers' caches; writes no file",
        tune="time the kernel configurations; writes no file",
    )
    torch.manual_seed(0)
    thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device="cuda")
    hstu = Hstu(CONFIG).to("cuda").requires_grad_(False).eval()
    for layer in hstu.layers:
        for table in (layer.position_bias, layer.time_bias):
            torch.nn.init.normal_(table)  # type: ignore[arg-type]  # a parameter
    works = [Work.generate(*numbers, quick=args.quick) for numbers in WORKLOADS]
    if args.tune:
        for work in works:
            tune(work, thresholds)
        return
    rows = [each for work in works for each in measure(hstu, work, thresholds)]
    times = {(each["workload"], each["implementation"]): median_ms(each) for each in rows}
    metrics: dict[str, float] = {}
    for short, work in zip(("large", "middle", "single"), works, strict=True):
        graph = times[work.name, "kernels: graph"]
        metrics[f"{short}_ms"] = graph
        metrics[f"{short}_newest_ms"] = times[work.name, "kernels: graph, newest rows"]
        metrics[f"{short}_speedup_over_eager"] = round(times[work.name, "torch: eager, padded"] / graph, 2)
        metrics[f"{short}_speedup_over_compiled"] = round(times[work.name, "torch: compiled, padded"] / graph, 2)
    if not args.quick:
        print(results.write(card_name("kernels"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
