"""The figures in the README and the documents are those of the result files, rounded."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.benchmarks import accuracy_figures, kernel_figures, results
from tests.benchmarks.accuracy_figures import (
    ACCURACY,
    BEAUTY,
    BEAUTY_AGAIN,
    HEADS,
    JOURNEY,
    RETENTION_GAPS,
    TASKS,
    best_trial,
    most_trials,
    number,
    summary,
)
from tests.benchmarks.kernel_figures import N

RANKINGS = ("hit_rate_popularity", "hit_rate_cooccurrence", "hit_rate_hstu")
STREAM, REPLAY, SWAP, TRAINING, TRAINING_GPU = (
    results.load(results.FOLDER / f"{name}.json") for name in ("stream", "replay", "swap", "training", "training_gpu")
)
ITEMS = results.load(results.FOLDER / "items.json")
LOOKUP = results.load(results.FOLDER / "lookup.json")
CHAOS = results.load(results.FOLDER / "chaos.json")
PAIRS = results.load(results.FOLDER / "stream_pairs.json")
RUNS = {row["run"]: row for row in STREAM.rows}
MOVIELENS, SHOP = REPLAY.rows


def items_figures(name: str) -> list[float]:
    return [ITEMS.metrics[f"{name}_{width}"] for width in (64, 512)]


def lookup_figures(size: int) -> list[float]:
    return [LOOKUP.metrics[f"{by}_{size}_{figure}"] for by in ("library", "http") for figure in ("p50_ms", "p99_ms")]


MACHINES = {
    "2 cores AMD EPYC, 23 GiB, no GPU, Python 3.11.7": "EPYC",
    "2 cores Intel(R) Xeon(R) Processor, 23 GiB, no GPU, Python 3.11.7": "CPU",
    "16 cores Intel(R) Xeon(R) Processor, 125 GiB, NVIDIA H100 80GB HBM3, Python 3.12.3": "H100",
    "16 cores Intel(R) Xeon(R) Processor, 125 GiB, NVIDIA H200, Python 3.12.3": "H200",
}

README = {
    rf"counters \(`simple`\) \| {N} \| {N} by a plain consume-infer-produce loop: {N} times": [
        STREAM.metrics["slates_per_s_simple"], RUNS["plain simple"]["slates_per_s"], STREAM.metrics["simple_speedup"],
    ],
    rf"width 64 \| {N} \| {N} by the plain loop: {N} times": [
        STREAM.metrics["slates_per_s_hstu"], RUNS["plain hstu"]["slates_per_s"], STREAM.metrics["hstu_speedup"],
    ],
    rf"slate consumed, at {N} events/s \| p50 {N} ms, p95 {N} ms, p99 {N} ms": [
        STREAM.metrics[name] for name in ("latency_rate_per_s", "p50_ms", "p95_ms", "p99_ms")
    ],
    rf"through Kafka \| {N} \| [^|]*: popularity {N}, co-occurrence {N}; "
    rf"on [^|]* {N}, popularity {N}, co-occurrence {N} \|": [
        MOVIELENS[f"hit_rate_{name}{steps}"]
        for steps in ("", "_untied") for name in ("slate", "popularity", "cooccurrence")
    ],
    rf"simulated shop \| {N} \| [^|]*: popularity {N}, co-occurrence {N}, ground truth {N} \|": [
        SHOP[f"hit_rate_{name}"] for name in ("hstu", "popularity", "cooccurrence", "truth")
    ],
} | accuracy_figures.README | kernel_figures.README  # fmt: skip

BENCHMARKS = {
    rf"{N} events per slate": [STREAM.metrics["events_per_slate"]],
    rf"`simple` \| {N} slates/s \| {N} slates/s \| {N} times": [
        RUNS["plain simple"]["slates_per_s"], STREAM.metrics["slates_per_s_simple"], STREAM.metrics["simple_speedup"],
    ],
    rf"width 64 \| {N} slates/s \| {N} slates/s \| {N} times": [
        RUNS["plain hstu"]["slates_per_s"], STREAM.metrics["slates_per_s_hstu"], STREAM.metrics["hstu_speedup"],
    ],
    rf"half of the rate above, {N} events/s \| {N} ms \| {N} ms \| {N} ms": [
        STREAM.metrics[name] for name in ("latency_rate_per_s", "p50_ms", "p95_ms", "p99_ms")
    ],
    rf"a quarter, {N} events/s \| {N} ms \| {N} ms \| {N} ms": [
        RUNS["a quarter of the rate"][name] for name in ("latency_rate_per_s", "p50_ms", "p95_ms", "p99_ms")
    ],
    rf"{N} seeds of 60 s each": [len(CHAOS.rows)],
    rf"{N} faults among {N} events: {N} lost, {N} rings wrong, {N} slates out of order": [
        sum(len(str(row["faults"]).split()) for row in CHAOS.rows),
        *(CHAOS.metrics[name] for name in ("events", "lost", "rings_wrong", "out_of_order")),
    ],
    rf"had been produced was answered and committed is {N} s": [CHAOS.metrics["worst_recovery_s"]],
    rf"\| 400 \| p50 {N} ms, p99 {N} ms \| p50 {N} ms, p99 {N} ms \|": lookup_figures(400),
    rf"\| 2,000 \| p50 {N} ms, p99 {N} ms \| p50 {N} ms, p99 {N} ms \|": lookup_figures(2000),
    rf"adds to the next batches \| {N} ms \| {N} ms": items_figures("new_record_ms"),
    rf"the slowest of 11 new records \| {N} ms \| {N} ms": items_figures("worst_new_item_ms"),
    rf"withdrawal, likewise \| {N} ms \| {N} ms": items_figures("withdrawal_ms"),
    rf"all different, all chunks \| {N} ms \| {N} ms": items_figures("swap_catalogue_ms"),
    rf"loads, over that afterwards \| {N} \| {N} \|": items_figures("load_peak_ratio"),
    rf"memory per record [^|]*\| {N} bytes \| {N} bytes": items_figures("bytes_per_record"),
    rf"besides its vector \| {N} bytes \| {N} bytes": items_figures("bytes_per_item_beyond_table"),
    rf"grew by {N} %": [STREAM.metrics["rss_growth_pct"]],
    rf"ratio of the rates is {N} with `hstu` and {N} with `simple`": [
        PAIRS.metrics[f"median_ratio_slates_per_s_{strategy}"] for strategy in ("hstu", "simple")
    ],
    rf"single pairs range from {N} to {N} and from {N} to\s+{N},": [
        extreme(float(row[f"ratio_slates_per_s_{strategy}"] or 0) for row in PAIRS.rows)
        for strategy in ("hstu", "simple")
        for extreme in (min, max)
    ],
    rf"full log through Kafka: {N} slates, {N} lost \| {N} \| {N} \| {N} \|": [
        REPLAY.metrics["slates"], REPLAY.metrics["lost"], *(REPLAY.metrics[name] for name in RANKINGS),
    ],
    rf"{N} % of the scored steps are tied; on the others {N}, {N} and {N} \|": [
        100 * REPLAY.metrics["tied_fraction"],
        *(MOVIELENS[f"hit_rate_{name}_untied"] for name in ("popularity", "cooccurrence", "slate")),
    ],
    rf"8 heads\) \| {N} \| {N} \| {N} \| {N} % of the gap to the ground truth's {N}": [
        *(SHOP[name] for name in RANKINGS), 100 * REPLAY.metrics["truth_gap_closed_simulated"], SHOP["hit_rate_truth"],
    ],
    rf"{N} model swaps at {N} events/s, half": [SWAP.metrics[name] for name in ("swaps", "slates_per_s")],
    rf"{N} events lost, p99 from creation to consumer {N} ms before and {N} ms during": [
        SWAP.metrics[name] for name in ("lost", "p99_ms_before", "p99_ms_during")
    ],
    rf"a log of {N} events in at most {N} GiB; its {N} steps train on {N} events/s": [
        TRAINING.metrics["events"], TRAINING.metrics["peak_rss_gib"],
        TRAINING.metrics["trained_events"] / 2048, TRAINING.metrics["events_per_s_cpu"],
    ],
    rf"--device cuda` \| its steps train on {N} events/s": [TRAINING_GPU.metrics["events_per_s_gpu"]],
} | accuracy_figures.BENCHMARKS | kernel_figures.BENCHMARKS  # fmt: skip


PAGES = {
    "README.md": README,
    "docs/benchmarks.md": BENCHMARKS,
    "docs/evaluation.md": accuracy_figures.EVALUATION,
    "docs/model.md": accuracy_figures.MODEL,
    "docs/kernels.md": kernel_figures.KERNELS,
    "docs/operations.md": kernel_figures.OPERATIONS,
    "docs/adr/0002-the-product-before-attention-is-cute-on-hopper.md": kernel_figures.PRODUCT_BEFORE_ATTENTION,
}
CLAIMS = [(page, *claim) for page, claims in PAGES.items() for claim in claims.items()]
# The trials of MovieLens are those of an earlier result, which recorded the command of its last stage only.
TRIALS_TAKEN_OVER = {
    ("`accuracy.json`, tune", "accuracy --stage report --out build/accuracy"): (
        "accuracy --stage tune --workers 16 --out build/accuracy"
    )
}
RENAMED_OPTIONS = {"--trained": "--events-per-epoch", "--batch-events": "--events-per-batch"}  # since the files


def page_text(name: str) -> str:
    return (results.ROOT / name).read_text()


@pytest.mark.parametrize(
    ("page", "sentence", "measured"), CLAIMS, ids=[f"{page}:{number}" for number, (page, *_) in enumerate(CLAIMS)]
)
def test_figures_of_a_page_are_the_measured_ones(page: str, sentence: str, measured: list[float]) -> None:
    text = re.sub(r"\s+", " ", page_text(page))  # wherever its lines break
    [found] = re.findall(sentence, text)
    for figure, value in zip([found] if isinstance(found, str) else found, measured, strict=True):
        last_digit = 10.0 ** -len(figure.partition(".")[2])
        assert float(figure.replace(",", "").replace("−", "-")) == pytest.approx(value, abs=0.5 * last_digit + 1e-9)


def test_every_row_of_the_readme_table_is_checked() -> None:
    rows = [line for line in page_text("README.md").splitlines() if "tests/benchmarks/results/" in line]
    unchecked = [row for row in rows if not any(re.search(sentence, row) for sentence in README)]
    assert len(rows) == len(README)
    assert unchecked == []


def test_rows_of_the_readme_table_name_the_machine_of_their_file() -> None:
    rows = re.findall(r"\| (\w+), \[\w+\]\((tests/benchmarks/results/\S+)\) \|", page_text("README.md"))
    assert len(rows) == len(README)
    for machine, path in rows:
        assert machine == MACHINES[results.load(results.ROOT / path).hardware]


def test_no_seed_of_faults_lost_or_changed_anything() -> None:
    assert len(CHAOS.rows) >= 20
    assert not any(row[name] for row in CHAOS.rows for name in ("lost", "rings_wrong", "out_of_order"))
    without_partitions = [row for row in CHAOS.rows if "add_partition" not in str(row["faults"])]
    assert max(float(row["worst_recovery_s"] or 0) for row in without_partitions) < 8


def test_no_lookup_of_a_burst_failed() -> None:
    assert [row["failed"] for row in LOOKUP.rows] == [0] * 4


def test_movielens_model_is_named_by_its_training_options() -> None:
    assert f"MovieLens 100k, `{MOVIELENS['model']}`;" in page_text("docs/benchmarks.md")


def test_ablations_lie_within_the_interval_of_the_tuned_model() -> None:
    [low, high] = summary(ACCURACY, "hstu", "all", "ndcg10_ci_low", "ndcg10_ci_high")
    _, models = accuracy_figures.RANKINGS["MovieLens 100k"]
    ablations = [model for model in models.values() if model.startswith("hstu, ")]
    assert len(ablations) == 5
    assert all(low < summary(ACCURACY, model, "all", "ndcg10")[0] < high for model in ablations)


def test_best_trials_on_the_groceries_end_at_their_last_epoch() -> None:
    for model in ("hstu", "sasrec"):
        best = best_trial(JOURNEY, model)
        assert best["epoch"] == json.loads(str(best["options"]))["trainer.epochs"]


def test_retention_misses_its_target_where_its_weight_is_below_1() -> None:
    missed = {name for name, gap in RETENTION_GAPS.items() if gap > 0.03}
    assert missed == {"fixed 0.3 0.3 0.3", "fixed 2 0.5 0.5", "fixed 0.5 0.5 2"}


def test_no_head_of_the_dense_shop_is_scaled() -> None:
    assert all(row[f"{head}_ece"] == row[f"{head}_ece_raw"] for row in HEADS.rows for head in TASKS)


def test_best_trials_on_beauty_are_those_of_its_first_search() -> None:
    assert most_trials(BEAUTY) == most_trials(BEAUTY_AGAIN)
    for model in ("hstu", "hstu_contents", "sasrec"):
        first, second = (number(best_trial(result, model)["ndcg10"]) for result in (BEAUTY, BEAUTY_AGAIN))
        assert first > second


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_list_of_runs_has_each_stage_of_each_file_with_its_commit_command_and_machine(path: Path) -> None:
    result = results.load(path)
    runs = [(f"`{path.name}`, {stage.stage}", stage) for stage in result.stages] or [(f"`{path.name}`", result)]
    for name, run in runs:
        words = [RENAMED_OPTIONS.get(word, word) for word in shlex.split(run.command)]
        command = shlex.join(words).removeprefix("python -m tests.benchmarks.")
        command = TRIALS_TAKEN_OVER.get((name, command), command)
        assert f"| {name} | {run.commit} | `{command}` | {MACHINES[run.hardware]} |\n" in page_text(
            "docs/benchmarks.md"
        )


def test_machines_of_the_result_files_are_those_that_are_described() -> None:
    hardware = {json.loads(path.read_bytes())["hardware"] for path in results.FOLDER.glob("*.json")}
    assert hardware == MACHINES.keys()
