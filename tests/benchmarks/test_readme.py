"""README's figures are those of the results files, rounded."""

import re

import pytest

from tests.benchmarks import results

README = (results.ROOT / "README.md").read_text()
STREAM, REPLAY, SWAP, TRAINING, ACCURACY, HEADS, COLD, TRAINING_GPU = (
    results.load(results.FOLDER / f"{name}.json")
    for name in ("stream", "replay", "swap", "training", "accuracy", "heads", "cold", "training_gpu")
)
KERNELS, PROJECTION, RETRIEVAL, ENCODING = (
    results.load(results.FOLDER / f"{name}_h100.json")
    for name in ("kernels", "kernels_projection", "kernels_retrieval", "encoding")
)
TOP_100 = next(row for row in RETRIEVAL.rows if row["implementation"] == "fused")  # of the first workload
FUSION = next(row for row in RETRIEVAL.rows if "events ->" in row["workload"] and row["implementation"] == "fused")
RUNS = {row["run"]: row for row in STREAM.rows}
FILMS, SHOP = REPLAY.rows
TASKS = ("engagement", "retention", "monetization")
RANKINGS = ("hit_rate_popularity", "hit_rate_cooccurrence", "hit_rate_hstu")
N = r"([\d,]*\d(?:\.\d+)?)"

CLAIMS = {
    rf"{N} events a slate": [STREAM.metrics["events_per_slate"]],
    rf"`simple` \| {N} slates/s \| {N} slates/s \| {N} times": [
        RUNS["plain simple"]["slates_per_s"], STREAM.metrics["slates_per_s_simple"], STREAM.metrics["simple_speedup"],
    ],
    rf"width 64 \| {N} slates/s \| {N} slates/s \| {N} times": [
        RUNS["plain hstu"]["slates_per_s"], STREAM.metrics["slates_per_s_hstu"], STREAM.metrics["hstu_speedup"],
    ],
    rf"at half of that rate, {N} events/s \| {N} ms \| {N} ms \| {N} ms": [
        STREAM.metrics[name] for name in ("latency_rate_per_s", "p50_ms", "p95_ms", "p99_ms")
    ],
    rf"at a quarter, {N} events/s \| {N} ms \| {N} ms \| {N} ms": [
        RUNS["a quarter of the rate"][name] for name in ("latency_rate_per_s", "p50_ms", "p95_ms", "p99_ms")
    ],
    rf"grew by {N} %": [STREAM.metrics["rss_growth_pct"]],
    rf"whole through Kafka: {N} slates, {N} lost \| {N} \| {N} \| {N} \| {N} times": [
        REPLAY.metrics["slates"], REPLAY.metrics["lost"],
        *(REPLAY.metrics[name] for name in RANKINGS),
        REPLAY.metrics["hit_rate_hstu"] / REPLAY.metrics["hit_rate_cooccurrence"],
    ],
    rf"8 heads\) \| {N} \| {N} \| {N} \| {N} % of the way to the truth's {N}": [
        *(SHOP[name] for name in RANKINGS), 100 * REPLAY.metrics["truth_gap_closed_simulated"], SHOP["hit_rate_truth"],
    ],
    rf"exchanges {N} models under {N} events/s,\nhalf of what the worker can: {N} events lost": [
        SWAP.metrics[name] for name in ("swaps", "slates_per_s", "lost")
    ],
    rf"consumer {N} ms before and {N} ms meanwhile": [SWAP.metrics[f"p99_ms_{name}"] for name in ("before", "during")],
    rf"a log of {N} events in at most\n{N} GiB; its steps, of which it takes 58, train {N} events/s": [
        TRAINING.metrics[name] for name in ("events", "peak_rss_gib", "events_per_s_cpu")
    ],
    rf"NDCG@10 {N}, a SASRec {N}; HR@10 {N}, a SASRec {N} \|": [
        ACCURACY.metrics[name] for name in ("ndcg10_hstu", "ndcg10_sasrec", "hr10_hstu", "hr10_sasrec")
    ],
    rf"{N} % ahead in NDCG@10 \(95 % interval from {N} %\), {N} % in HR@10 \(from {N} %\)": [
        100 * ACCURACY.metrics[name] for name in ("ndcg10_gain", "ndcg10_gain_ci_low", "hr10_gain", "hr10_gain_ci_low")
    ],
    rf"{N} engagement, {N} retention, {N} monetization \| calibration errors {N}, {N}, {N} \|": [
        HEADS.metrics[f"{task}_{measure}"] for measure in ("gap", "ece") for task in TASKS
    ],
    rf"{N}, content-kNN {N} \| {N} times": [
        COLD.metrics[name] for name in ("recall50_hstu", "recall50_contentknn", "ratio")
    ],
    rf"--device cuda`: speed of its steps \| {N} events/s": [TRAINING_GPU.metrics["events_per_s_gpu"]],
    rf"all states \| {N} ms \| {N} times eager torch on padded users, {N} times": [
        KERNELS.metrics[f"large_{name}"] for name in ("ms", "speedup_over_eager", "speedup_over_compiled")
    ],
    rf"64 users, 5,601 events \| {N} ms \| {N} times eager torch, {N} times": [
        KERNELS.metrics[f"middle_{name}"] for name in ("ms", "speedup_over_eager", "speedup_over_compiled")
    ],
    rf"1 user of 256 events \| {N} ms \| {N} times": [
        KERNELS.metrics["single_ms"], KERNELS.metrics["single_speedup_over_eager"],
    ],
    rf"events and layers \| {N} ms \| Triton's {N};": [
        PROJECTION.metrics["large_cute_ms"], PROJECTION.metrics["large_triton_ms"],
    ],
    rf"for 256 users, width 256 \| {N} ms \| {N} times": [TOP_100["median_ms"], RETRIEVAL.metrics["top_k_speedup"]],
    rf"events each into {N} tokens, width 256 \| {N} ms \| {N} times": [
        int(str(FUSION["workload"]).split()[-2]), FUSION["median_ms"], RETRIEVAL.metrics["fusion_speedup"],
    ],
    rf"width 64 \| {N} ms \| {N} times eager": [ENCODING.metrics["tiny_256_ms"], ENCODING.metrics["tiny_256_speedup"]],
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "measured"), CLAIMS.items(), ids=range(len(CLAIMS)))
def test_what_readme_says_is_what_was_measured(sentence: str, measured: list[float]):
    (said,) = re.findall(sentence, README)
    for text, value in zip([said] if isinstance(said, str) else said, measured, strict=True):
        last_place = 10.0 ** -len(text.partition(".")[2])
        assert float(text.replace(",", "")) == pytest.approx(value, abs=0.5 * last_place + 1e-9)


def test_the_films_model_is_named_by_the_options_that_it_was_trained_with():
    assert f"MovieLens 100k, `{FILMS['model']}`," in README
