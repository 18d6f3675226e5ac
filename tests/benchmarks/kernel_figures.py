"""Sentences with figures of the GPU benchmarks, and the rows of the H200's result files that they quote.

Each pattern stands for one sentence or table row of a page, its groups for the figures in it.
"""

import re

from tests.benchmarks import results
from tests.benchmarks.results import Result

N = r"([−+]?[\d,]*\d(?:\.\d+)?)"
KERNEL, PROJECTION, GATED, TOP_K, RETRIEVAL, ENCODING, STEPS, RANKING = (
    results.load(results.FOLDER / f"{name}_h200.json")
    for name in (
        "kernels",
        "kernels_projection",
        "kernels_gated",
        "kernels_retrieval",
        "retrieval",
        "encoding",
        "training_steps",
        "ranking",
    )
)
TB_PER_GB = 1e-3


def cell(result: Result, workload: str, implementation: str, column: str = "median_ms") -> float:
    """Return a figure of the only row of this implementation whose workload begins with these words."""
    rows = [row for row in result.rows if str(row["workload"]).startswith(workload)]
    [value] = [row[column] for row in rows if row["implementation"] == implementation]
    assert isinstance(value, float | int), (workload, implementation, column)
    return float(value)


def medians(result: Result, workload: str, *implementations: str) -> list[float]:
    """Return the milliseconds of these implementations."""
    return [cell(result, workload, implementation) for implementation in implementations]


def table_row(label: str, count: int) -> str:
    """Return the pattern of a table row with this label and number of figures."""
    return rf"\| {re.escape(label)}" + rf" \| {N}" * count + r" \| (?!\d)"


def against_torch(size: str) -> list[float]:
    return [KERNEL.metrics[f"{size}_{name}"] for name in ("ms", "speedup_over_eager", "speedup_over_compiled")]


LARGE = "74,108 rows"
TOP_100 = "1,000,000 x 256, 256 users"
TOP_100_SINGLE = "1,000,000 x 256, 1 users"
FUSION = "256 users x 4096 events"
[FUSED_TOKENS] = {int(str(row["workload"]).split()[-2]) for row in TOP_K.rows if FUSION in str(row["workload"])}

README = {
    rf"74,108 events, bfloat16 \| {N} ms \| eager torch {N} times, `torch.compile` {N} times": against_torch("large"),
    rf"256 users, width 256 \| {N} ms \| torch's product and `topk` {N} times": [
        cell(TOP_K, TOP_100, "fused"), TOP_K.metrics["top_k_speedup"],
    ],
}  # fmt: skip

BATCHES = {
    "1 user, 39 events": (1, 39), "128 users, 4,684 events": (128, 4684), "256 users, 9,214 events": (256, 9214)
}  # fmt: skip
STEP_TIMES = ("prepare_ms", "launch_ms", "finish_ms", "total_ms")
LARGEST_BATCH = (256, 53261)


def ranked(slates: str, users: int, events: int, *columns: str) -> list[float]:
    """Return the times of the row of the preset `10m`."""
    batch = {"model": "10m", "slates": slates, "users": users, "events": events}
    [row] = [row for row in RANKING.rows if batch.items() <= row.items()]
    return [float(row[column] or 0) for column in columns]


def slower_prepare_percentages() -> list[float]:
    """Return by how much `prepare` takes longer in reranked rows."""
    return [
        100 * (ranked("reranked", *batch, "prepare_ms")[0] / ranked("plain", *batch, "prepare_ms")[0] - 1)
        for batch in BATCHES.values()
    ]


BENCHMARKS = {
    rf"all states \| {N} ms \| eager torch on padded users takes {N} times, `torch.compile` {N} times": (
        against_torch("large")
    ),
    rf"64 users, 5,601 events \| {N} ms \| eager torch {N} times, `torch.compile` {N} times": against_torch("middle"),
    rf"1 user with 256 events \| {N} ms \| eager torch {N} times, `torch.compile` {N} times": against_torch("single"),
    rf"events and layers \| {N} ms \| Triton {N} ms": medians(
        PROJECTION, LARGE, "kernels: CuTe DSL", "kernels: Triton"
    ),
    rf"for 256 users, width 256 \| {N} ms \| torch's product and `topk` {N} times": [
        cell(TOP_K, TOP_100, "fused"), TOP_K.metrics["top_k_speedup"],
    ],
    rf"events each into {N} tokens, width 256 \| {N} ms \| torch's operators {N} times": [
        FUSED_TOKENS, cell(TOP_K, FUSION, "fused"), TOP_K.metrics["fusion_speedup"],
    ],
    rf"width 64 \| {N} ms \| eager torch in float32 {N} times": [
        ENCODING.metrics["tiny_256_ms"], ENCODING.metrics["tiny_256_speedup"],
    ],
    **{
        rf"\| {slates} \| {label}" + rf" \| {N} ms" * 4: ranked(slates, *batch, *STEP_TIMES)
        for slates in ("plain", "reranked")
        for label, batch in BATCHES.items()
    },
    rf"takes {N} to {N} % longer in the reranked rows": [
        min(slower_prepare_percentages()), max(slower_prepare_percentages()),
    ],
    rf"256 users with {N} events, [^|]*? took {N} ms plain and {N} ms reranked": [
        LARGEST_BATCH[1],
        *(ranked(slates, *LARGEST_BATCH, "total_ms")[0] for slates in ("plain", "reranked")),
    ],
}  # fmt: skip

ENCODERS = (
    "torch: eager, padded",
    "torch: compiled, padded",
    "cuBLAS: products alone",
    "kernels: graph",
    "kernels: graph, newest rows",
)
ENCODER_TABLE = {
    table_row(label, len(ENCODERS)): medians(KERNEL, workload, *ENCODERS)
    for label, workload in (
        ("256 users, mean 289, max 1,024", "256 users"),
        ("64 users, max 256", "64 users"),
        ("1 user, 256 events", "1 users"),
    )
}
ENCODE_TABLE = {
    table_row(f"`{preset}`, {label} events", 3): medians(
        ENCODING, f"{preset}: {users} users", "torch: eager", "kernels", "kernels: graph"
    )
    for preset in ("tiny", "10m")
    for label, users in (("1 user, 200", 1), ("64 users, 5,262", 64), ("256 users, 19,259", 256))
}
STEPS_TABLE = {
    table_row(label, 2): medians(STEPS, workload, "torch", "kernels")
    for label, workload in (
        ("`tiny`, bfloat16, 160 users of log-normal lengths, 13,057 events", "tiny, log-normal, bfloat16"),
        ("`tiny`, float32, 160 users of log-normal lengths, 13,057 events", "tiny, log-normal, float32"),
        ("`tiny`, bfloat16, 6,000 users, 14,947 events", "tiny, many short, bfloat16"),
        ("`tiny`, float32, 6,000 users, 14,947 events", "tiny, many short, float32"),
        ("`10m`, bfloat16, 160 users, 13,057 events", "10m, log-normal, bfloat16"),
        ("`10m`, bfloat16, 6,000 users, 14,947 events", "10m, many short, bfloat16"),
        ("`10m`, float32, 160 users, 13,057 events (left to torch)", "10m, log-normal, float32"),
    )
}

COPY_TB_PER_S = TB_PER_GB * cell(TOP_K, "copy of 1 GiB", "torch: copy", "gb_per_s")
ATTENTION_MS, ATTENTION_TFLOPS, ATTENTION_GB_PER_S = (
    cell(KERNEL, "256 users", "kernels: attention alone", column) for column in ("median_ms", "tflops", "gb_per_s")
)
LATEST_ROWS_SAVE_PERCENT = 100 * (1 - KERNEL.metrics["large_newest_ms"] / KERNEL.metrics["large_ms"])
STATES_ERROR_PERCENT = [100 * float(row["max_error"] or 0) for row in ENCODING.rows if row["max_error"]]
CAPTURE_S = [cell(ENCODING, preset, "graphs: 214 made") / 1e3 for preset in ("tiny", "10m")]

KERNELS = ENCODER_TABLE | ENCODE_TABLE | STEPS_TABLE | {
    rf"one user's: it takes {N} ms alone, and the full encoder, [^.]* takes {N}\.": medians(
        KERNEL, "1 users", "kernels: attention alone", "kernels: graph"
    ),
    rf"one byte per score for its time bucket \| {N} ms": [
        cell(KERNEL, "256 users", "kernels: plan and time buckets alone")
    ],
    rf"sums of squares \| {N} ms; `projection_hopper.py` on Hopper {N} \|": medians(
        PROJECTION, LARGE, "kernels: Triton", "kernels: CuTe DSL"
    ),
    rf"its part of each row \| {N} ms \|": [ATTENTION_MS],
    rf"sums for the next layer \| {N} ms \|": [cell(GATED, LARGE, "one launch")],
    rf"shapes that were not measured \| {N} ms \|": [cell(GATED, LARGE, "two launches")],
    rf"It reaches {N} TB/s of the bytes that must be moved, two launches reach {N}\.": [
        TB_PER_GB * cell(GATED, LARGE, launches, "gb_per_s") for launches in ("one launch", "two launches")
    ],
    rf"For 5,601 rows it takes {N} instead of {N} ms, for 2,300 rows {N} instead of {N}\.": [
        *medians(GATED, "5,601 rows", "one launch", "two launches"),
        *medians(GATED, "2,300 rows", "one launch", "two launches"),
    ],
    rf"the error of one layer's attention and gate is {N} %": [
        100 * cell(KERNEL, "256 users", "kernels: graph", "max_error")
    ],
    rf"In the first row they save {N} %": [LATEST_ROWS_SAVE_PERCENT],
    rf"a graph of exactly its size takes {N} ms": [cell(KERNEL, "256 users", "kernels: graph of this very size")],
    rf"Attention alone runs at {N} TFLOP/s\. At {N} TB/s, [^.]* would take {N} of its {N} ms": [
        ATTENTION_TFLOPS, COPY_TB_PER_S,
        ATTENTION_MS * TB_PER_GB * ATTENTION_GB_PER_S / COPY_TB_PER_S, ATTENTION_MS,
    ],
    rf"specialised warps: {N} ms, against {N} for Triton and {N} for cuBLASLt's product alone": medians(
        PROJECTION, LARGE, "kernels: CuTe DSL", "kernels: Triton", "cuBLASLt: product alone"
    ),
    rf"It needs {N} MiB of extra memory": [TOP_K.metrics["top_k_extra_mib"]],
    rf"call takes {N} ms, torch's product and `topk` {N}, its product alone {N} \(": medians(
        TOP_K, TOP_100, "fused", "torch: product, topk", "torch: product"
    ),
    rf"six launches count: {N} ms, and for one user {N} instead of {N}\.": [
        cell(TOP_K, TOP_100, "fused, no graph"), *medians(TOP_K, TOP_100_SINGLE, "fused, no graph", "fused"),
    ],
    rf"{N} ms on one NVIDIA H200, where torch's operators take {N} times as long \({N} ms\)": [
        cell(TOP_K, FUSION, "fused"), TOP_K.metrics["fusion_speedup"],
        cell(TOP_K, FUSION, "torch: unfused, no graph"),
    ],
    rf"That is {N} TB/s of item rows and output, {N} % of": [
        TB_PER_GB * cell(TOP_K, FUSION, "fused", "gb_per_s"), TOP_K.metrics["fusion_peak_bandwidth_pct"],
    ],
    rf"a million items {N} ms, with torch {N}; 64 users and 100,000 items {N} and {N}\.": [
        *medians(RETRIEVAL, "256 users, 1,000,000 items", "operator", "torch"),
        *medians(RETRIEVAL, "64 users, 100,000 items", "operator", "torch"),
    ],
    rf"16 users and a million items take {N} and {N} ms": medians(
        RETRIEVAL, "16 users, 1,000,000 items", "operator", "torch"
    ),
    rf"differ from float32's by {N} to {N} %": [min(STATES_ERROR_PERCENT), max(STATES_ERROR_PERCENT)],
    rf"Capturing 214 graphs took {N} s \(`tiny`\) and {N} s \(`10m`\)": CAPTURE_S,
}  # fmt: skip
OPERATIONS = {rf"On an H200 that takes {N} s for `tiny` and {N} s for `10m`": CAPTURE_S}

PRODUCTS = {
    "CuTe DSL": "kernels: CuTe DSL",
    "Triton": "kernels: Triton",
    "`torch.compile`, max-autotune-no-cudagraphs": "torch: compiled, max-autotune",
    "cuBLASLt by torch, then a compiled epilogue": "cuBLASLt, then a compiled epilogue",
    "cuBLASLt's product alone, nothing fused": "cuBLASLt: product alone",
}
PRODUCT_BEFORE_ATTENTION = {
    rf"\| {re.escape(label)} \| {N} \| {N} \|(?: 0\.\d+ %)? \| {N} \|": [
        cell(PROJECTION, LARGE, implementation, column) for column in ("median_ms", "tflops", "host_us")
    ]
    for label, implementation in PRODUCTS.items()
} | {
    rf"For 5,632 rows: {N}, {N}, {N}, {N} and {N} ms": medians(PROJECTION, "5,632 rows", *PRODUCTS.values()),
    rf"matrix units: {N} ms on an H200, in two launches {N}": medians(GATED, LARGE, "one launch", "two launches"),
}
