"""The result of an accuracy benchmark from its trials and tests: metrics with intervals, and rows."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from pipeline.evaluation.metrics import gains
from tests.benchmarks import results
from tests.benchmarks.accuracy_intervals import COLUMNS, CUTOFFS, METRICS, Estimate
from tests.benchmarks.accuracy_models import Benchmark
from tests.benchmarks.accuracy_runs import ALL_ITEMS, Outcome, Trial
from tests.benchmarks.results import Cell

ALL_STEPS = "all"
UNTIED_STEPS = "untied"
Estimates = Mapping[str, Estimate]  # by ranking


def report(benchmark: Benchmark, trials: list[Trial], tests: list[Outcome], folder: Path) -> dict[str, float]:
    """Write the benchmark's result file into the folder and return its metrics."""
    steps = {name: estimates(tests, name) for name in (ALL_STEPS, UNTIED_STEPS)}
    metrics = _metrics(benchmark, steps) | {"tied_share": _tied_share(tests[0])}
    rows = [
        *_summary_rows(steps),
        *_test_rows(benchmark, tests),
        *_trial_rows(trials),
        *_space_rows(benchmark),
        *({"kind": "published", **row} for row in benchmark.published),
    ]
    stages = [each.stage for each in (*trials, *tests)]
    machines = "; ".join(sorted({test.stage.hardware for test in tests}))
    rounded = {name: round(value, 5) for name, value in metrics.items()}
    print(f"written: {results.write(benchmark.name, rounded, rows, folder, machines, stages)}")
    for name, value in rounded.items():
        print(f"  {name}: {value}")
    return rounded


def estimates(tests: list[Outcome], steps: str) -> dict[str, Estimate]:
    """Return the estimates by ranking, over the events drawn from all or over the untied ones; none without any."""
    first = tests[0]
    mask = np.array(first.is_sampled) if steps == ALL_STEPS else ~np.array(first.is_tied)
    if not mask.any():
        return {}
    users = np.array(first.users)[mask]
    ranks: dict[str, list[np.ndarray]] = {}
    for test in tests:
        ranks.setdefault(test.model, []).append(np.array(test.ranks[ALL_ITEMS])[mask])
    return {
        model: Estimate.from_ranks(by_seed, users, seed) for seed, (model, by_seed) in enumerate(sorted(ranks.items()))
    }


def _metrics(benchmark: Benchmark, steps: Mapping[str, Estimates]) -> dict[str, float]:
    """Return each contender's means at 10 among all items, and the relative gains with their intervals.

    A gain is left out where the other ranking has too few hits to divide by.
    """
    metrics: dict[str, float] = {}
    for name, by_model in steps.items():
        suffix = "" if name == ALL_STEPS else f"_{name}"
        for model in by_model.keys() & benchmark.contenders:
            for column in ("hr10", "ndcg10"):
                metrics[f"{column}_{model}{suffix}"] = by_model[model].at(column)[0]
        for gain in benchmark.gains:
            if by_model and (value := by_model[gain.ours].gain_over(by_model[gain.theirs], gain.column)):
                metrics |= _with_bounds(f"{gain.name}{suffix}", value)
    return dict(sorted(metrics.items()))


def _with_bounds(name: str, value: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_ci_low", f"{name}_ci_high"), value, strict=True))


def _tied_share(test: Outcome) -> float:
    """Return the fraction of the held-out events whose user's previous event has the same time."""
    return float(np.mean(np.array(test.is_tied)[np.array(test.is_sampled)]))


def _summary_rows(steps: Mapping[str, Estimates]) -> list[dict[str, Cell]]:
    """Return one row per ranking and set of steps: means over events and seeds, with their bounds."""
    rows: list[dict[str, Cell]] = []
    for name, by_model in steps.items():
        for model, estimate in by_model.items():
            rows.append({"kind": "summary", "model": model, "steps": name})
            for column in COLUMNS:
                rows[-1] |= {key: round(x, 5) for key, x in _with_bounds(column, estimate.at(column)).items()}
    return rows


def _test_rows(benchmark: Benchmark, tests: Iterable[Outcome]) -> list[dict[str, Cell]]:
    """Return one row per ranking, seed and set of candidates, over the events drawn from all."""
    return [
        {
            "kind": "test",
            "model": test.model,
            "protocol": f"{benchmark.protocol}, {candidates}",
            "seed": test.seed,
            "events": int(np.sum(test.is_sampled)),
            "epoch": test.epoch,
            "options": msgspec.json.encode(test.options).decode(),
            **_at_cutoffs(np.array(ranks)[np.array(test.is_sampled)]),
            "seconds": round(test.seconds, 1),
            "commit": test.stage.commit,
        }
        for test in tests
        for candidates, ranks in test.ranks.items()
    ]


def _at_cutoffs(ranks: np.ndarray) -> dict[str, Cell]:
    means = {cutoff: gains(ranks, cutoff).mean(0).tolist() for cutoff in CUTOFFS}
    return {
        f"{name}{cutoff}": round(value, 5)
        for cutoff, row in means.items()
        for name, value in zip(METRICS, row, strict=True)
    }


def _trial_rows(trials: Iterable[Trial]) -> list[dict[str, Cell]]:
    """Return one row per trial, also of the bad ones."""
    return [
        {
            "kind": "trial",
            "model": trial.model,
            "trial": trial.number,
            "epoch": trial.epoch,
            "ndcg10": round(trial.metrics.ndcg, 5),
            "hr10": round(trial.metrics.hit_rate, 5),
            "options": msgspec.json.encode(trial.options).decode(),
            "seconds": round(trial.seconds, 1),
            "commit": trial.stage.commit,
        }
        for trial in trials
    ]


def _space_rows(benchmark: Benchmark) -> list[dict[str, Cell]]:
    """Return the values that the random search draws from, uniformly."""
    return [
        {"kind": "space", "model": model, "option": option, "values": ", ".join(map(str, values))}
        for model, contender in benchmark.contenders.items()
        for option, values in contender.space.items()
    ]
