"""The heads against a simulated shop's true probabilities, and slates under users who react to them.

weightings  AUC of each head next to that of the true probabilities, on the last 20 % of a simulated log, and the
            expected calibration error before and after calibration, for three ways to weight the heads' losses (the
            first is the default) and a grid of fixed weights; by how much the best learned weighting's mean AUC exceeds
            the best fixed one's, with the 95 % interval of a bootstrap over users
loop        the shop continues from the log's end with slates of these models, reranked in several ways; what its users
            then do and pay. Means over several simulated futures, the same ones for every row, with standard errors

The first part writes heads.json, the second closed_loop.json.

The default shop is denser than that of `millrace simulate`: 86 events per user and 200 per item. The truth contains
each item's exact hidden quality, of which an item's first hundred outcomes give only a rough estimate.

Models and rows are files in the folder --work as soon as they are there: the same command continues where an earlier
one was stopped, or ran out of --minutes. It runs where there is only torch, numpy, msgspec and safetensors.

usage: python -m tests.benchmarks.heads [--parts weightings loop] [--epochs 12] [--forks 4] [--events N --users N
           --items N] [--device cuda] [--workers N] [--quick] [--work DIR] [--minutes N] [--out DIR]
"""

import argparse
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from msgspec.structs import asdict

from pipeline.evaluation.head_predictions import predict_heads
from pipeline.evaluation.metrics import head_metrics
from pipeline.evaluation.ranking import HeldOutEvents, StrategyRecommender, evaluate_ranking
from pipeline.features.labels import TASKS
from pipeline.simulation.closed_loop import TRUTHS, ClosedLoopMetrics, PolicyUnderTest, run
from pipeline.simulation.world import SimulatorConfig
from tests.benchmarks import results
from tests.benchmarks.head_aucs import mean_auc_gain
from tests.benchmarks.heads_bench import RERANKS, WEIGHTINGS, Setting, get_bench, uncalibrated
from tests.benchmarks.results import Cell
from tests.benchmarks.workers import Job, read_rows, run_saved

SHOP = SimulatorConfig(events=60_000, users=700, items=300)
QUICK = SimulatorConfig(events=4_000, users=200, items=60, days=40)
LOOP_DAYS = 14
RESULTS = {"weightings": "heads", "loop": "closed_loop"}  # by part
PROBABILITIES = "probabilities.npy"  # of the scored events, next to the model
HIT_RATE_EVENTS = 3000  # scored events whose hit rate is measured: what the heads cost the retrieval
LEARNED = ("uncertainty", "dwa")
DEFAULT = "fixed 1 1 1"
NOTHING = "nothing shown"
# No slates; the default model with every reranking; the learned weightings as ranked and reranked by money.
LOOPS = [(NOTHING, "off"), *((DEFAULT, name) for name in RERANKS), *product(LEARNED, ("off", "money"))]


def train_model(setting: Setting, weighting: str) -> dict[str, Cell]:
    get_bench(setting).train(weighting)
    return {"weighting": weighting}


def weighting_row(setting: Setting, weighting: str) -> dict[str, Cell]:
    """Measure the model of one weighting, and keep its probabilities for the comparison."""
    bench = get_bench(setting)
    scored = bench.scored
    artifact = bench.load(weighting)
    truth = np.stack([bench.truth[name] for name in TRUTHS], axis=1)[scored.sequences.log_positions[scored.positions]]
    strategy = bench.strategy(artifact)
    calibrated = predict_heads(strategy, scored)
    raw = predict_heads(bench.strategy(uncalibrated(artifact)), scored)
    np.save(bench.path(weighting) / PROBABILITIES, calibrated)
    sampled = np.sort(np.random.default_rng(0).permutation(scored.positions)[:HIT_RATE_EVENTS])
    sampled_events = HeldOutEvents(scored.sequences, sampled, scored.max_events)
    hit_rate = evaluate_ranking(StrategyRecommender(strategy), sampled_events, 10).hit_rate
    row: dict[str, Cell] = {"part": "weightings", "weighting": weighting, "hit_rate": hit_rate}
    for task, head in enumerate(TASKS):
        row |= head_row(head, calibrated[:, task], raw[:, task], truth[:, task], bench.labels[:, task])
    return row | {"auc": float(np.mean([float(row[f"{head}_auc"] or 0) for head in TASKS]))}


def head_row(
    head: str, calibrated: np.ndarray, raw: np.ndarray, truth: np.ndarray, labels: np.ndarray
) -> dict[str, Cell]:
    """Return the row of one head. calibrated, raw, truth: probabilities, float [n]; labels: float32 [n]."""
    got, uncalibrated, best = (head_metrics(each, labels) for each in (calibrated, raw, truth))
    assert got.auc is not None, f"the shop is too small: {head} has labels of one kind"
    assert best.auc is not None
    return {
        f"{head}_auc": got.auc,
        f"{head}_truth": best.auc,
        f"{head}_gap": best.auc - got.auc,
        f"{head}_ece_raw": uncalibrated.ece,
        f"{head}_ece": got.ece,
    }


def best_weighting(rows: list[dict[str, Cell]], learned: bool) -> str:
    """Return the learned or the fixed weighting with the highest mean AUC."""
    candidates = [row for row in rows if (row["weighting"] in LEARNED) == learned]
    return str(max(candidates, key=lambda row: float(row["auc"] or 0))["weighting"])


def learned_over_fixed(setting: Setting, rows: list[dict[str, Cell]]) -> dict[str, float]:
    """Return by how much the best learned weighting's mean AUC over the heads exceeds the best fixed one's."""
    bench = get_bench(setting)
    ours, theirs = (np.load(bench.path(best_weighting(rows, kind)) / PROBABILITIES) for kind in (True, False))
    names = ("learnt_over_fixed", "learnt_over_fixed_ci_low", "learnt_over_fixed_ci_high")
    return dict(zip(names, mean_auc_gain(ours, theirs, bench.labels, bench.scored.users), strict=True))


def loop_row(setting: Setting, weighting: str, rerank: str, forks: int) -> dict[str, Cell]:
    """Let the shop continue `forks` times with slates of this model and reranking."""
    bench = get_bench(setting)
    strategy = bench.strategy(bench.load(weighting), RERANKS[rerank]) if weighting != NOTHING else None
    outcomes = []
    for seed in range(forks):
        future = bench.simulator.fork(seed)
        policy = PolicyUnderTest(future, strategy, bench.vocabulary, bench.log) if strategy else None
        outcomes.append(run(future, setting.shop.days, LOOP_DAYS, policy))
    row: dict[str, Cell] = {"part": "loop", "weighting": weighting, "rerank": rerank}
    return row | _summary(outcomes)


def _summary(outcomes: list[ClosedLoopMetrics]) -> dict[str, Cell]:
    """Return means and standard errors over the futures."""
    columns = {name: [float(asdict(each)[name]) for each in outcomes] for name in ClosedLoopMetrics.__struct_fields__}
    columns["money_per_event"] = [each.money / each.events for each in outcomes]
    row: dict[str, Cell] = {}
    for name, column in columns.items():
        row[name] = float(np.mean(column))
        row[f"{name}_se"] = float(np.std(column, ddof=1) / np.sqrt(len(column))) if len(column) > 1 else None
    return row


def row_jobs(setting: Setting, parts: list[str], forks: int) -> dict[Path, Job]:
    """Return the jobs that measure the parts' rows, by their files."""
    jobs: list[Job] = [(weighting_row, setting, name) for name in WEIGHTINGS] if "weightings" in parts else []
    if "loop" in parts:
        jobs += [(loop_row, setting, weighting, rerank, forks) for weighting, rerank in LOOPS]
    return {setting.folder / f"{_stem(job)}.json": job for job in jobs}


def training_jobs(setting: Setting, jobs: dict[Path, Job]) -> dict[Path, Job]:
    """Return the jobs that train the models which the rows need."""
    needed = {str(weighting) for _, _, weighting, *_ in jobs.values() if weighting != NOTHING}
    trainings: list[Job] = [(train_model, setting, name) for name in WEIGHTINGS if name in needed]
    return {setting.folder / f"{_stem(job)}.json": job for job in trainings}


def _stem(job: Job) -> str:
    function, _, *names = job
    return "-".join([function.__name__, *map(str, names)]).replace(" ", "_")


def measure(
    setting: Setting, parts: list[str], forks: int, workers: int, minutes: float | None
) -> list[dict[str, Cell]]:
    """Train the models, measure the rows and return them. SystemExit when minutes ran out before."""
    jobs = row_jobs(setting, parts, forks)
    end_s = time.monotonic() + 60 * minutes if minutes is not None else None
    for stage in (training_jobs(setting, jobs), jobs):
        left = None if end_s is None else (end_s - time.monotonic()) / 60
        if missing := run_saved(stage, workers, left):
            raise SystemExit(f"{missing} jobs are left: the same command with the same --work continues")
    return list(read_rows(jobs))


def weighting_metrics(setting: Setting, rows: list[dict[str, Cell]]) -> dict[str, float]:
    """Return the figures that the documents quote."""
    by_weighting = {str(row["weighting"]): row for row in rows}
    default = by_weighting[DEFAULT]
    metrics = {
        f"{head}_{name}": float(default[f"{head}_{name}"] or 0) for head in TASKS for name in ("auc", "gap", "ece")
    }
    for name, learned in (("auc_best_fixed", False), ("auc_best_dynamic", True)):
        metrics[name] = float(by_weighting[best_weighting(rows, learned)]["auc"] or 0)
    return metrics | learned_over_fixed(setting, rows)


def loop_metrics(rows: list[dict[str, Cell]]) -> dict[str, float]:
    """Return the figures that the documents quote."""
    by_rerank = {str(row["rerank"]): row for row in rows if row["weighting"] == DEFAULT}
    plain = by_rerank["off"]
    money = by_rerank["money"]["money_per_event"]
    engaged = by_rerank["engagement"]["engaged_share"]
    return {
        "money_gain_by_rerank": float(money or 0) / float(plain["money_per_event"] or 1) - 1,
        "engagement_gain_by_rerank": float(engaged or 0) / float(plain["engaged_share"] or 1) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(RESULTS), default=list(RESULTS), help="parts to run")
    parser.add_argument("--epochs", type=int, default=12, help="number of epochs per training (default 12)")
    parser.add_argument("--forks", type=int, default=4, help="simulated futures per row of the loop (default 4)")
    parser.add_argument("--events", type=int, default=SHOP.events, help=f"events of the shop (default {SHOP.events})")
    parser.add_argument("--users", type=int, default=SHOP.users, help=f"users of the shop (default {SHOP.users})")
    parser.add_argument("--items", type=int, default=SHOP.items, help=f"items of the shop (default {SHOP.items})")
    parser.add_argument("--device", default="cpu", help="device of the models (default cpu)")
    parser.add_argument("--workers", type=int, default=1, help="number of parallel processes (default 1)")
    parser.add_argument("--quick", action="store_true", help="a small shop, to see that it runs; no meaningful figures")
    parser.add_argument("--work", type=Path, help="folder of models and rows (default: a temporary one)")
    parser.add_argument("--minutes", type=float, help="start no training or row after this many minutes")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    args = parser.parse_args()
    shop = QUICK if args.quick else SimulatorConfig(args.events, args.users, args.items)
    with TemporaryDirectory(prefix="millrace-heads-") as temporary:
        folder = (args.work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(shop, args.epochs, args.device, folder)
        rows = measure(setting, args.parts, args.forks, args.workers, args.minutes)
        for part in args.parts:
            part_rows = [row for row in rows if row["part"] == part]
            figures = weighting_metrics(setting, part_rows) if part == "weightings" else loop_metrics(part_rows)
            print(figures, f"written: {results.write(RESULTS[part], figures, part_rows, args.out)}", sep="\n")


if __name__ == "__main__":
    main()
