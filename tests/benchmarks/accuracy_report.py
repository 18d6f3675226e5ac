"""The result of the accuracy benchmark from its trials and ranks: rows, and intervals of HSTU's gain over SASRec."""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from pipeline.evaluation.bootstrap import interval, resampled_means
from pipeline.evaluation.metrics import gains
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS
from tests.benchmarks.accuracy_runs import Outcome, Trial
from tests.benchmarks.results import Cell

CUTOFFS = (5, 10, 20, 50)
METRICS = ("hr", "ndcg", "mrr")  # in the order of the columns of `gains`
ALL_ITEMS = "all items"


def report(trials: list[Trial], tests: list[Outcome], folder: Path) -> dict[str, float]:
    """Write accuracy.json into the folder and return its metrics."""
    metrics = _metrics(tests)
    rows = [*_test_rows(tests), *_trial_rows(trials), *_space_rows()]
    hardware = "; ".join(sorted({test.hardware for test in tests} | {trial.hardware for trial in trials}))
    print(f"written: {results.write('accuracy', metrics, rows, folder, hardware)}")
    for name, value in metrics.items():
        print(f"  {name}: {value}")
    return metrics


def _metrics(tests: list[Outcome]) -> dict[str, float]:
    """Return means over seeds at 10 among all items, and the relative gains of HSTU over SASRec with their intervals.

    A gain is left out when SASRec has too few hits to divide by.
    """
    means = {model: _mean_gains(tests, model) for model in CONTENDERS}
    metrics = {
        f"{metric}10_{model}": float(values[:, METRICS.index(metric)].mean())
        for metric in ("ndcg", "hr")
        for model, values in means.items()
    }
    users = np.array(next(test for test in tests if test.model == "hstu").users)
    samples = resampled_means(np.concatenate([means["hstu"], means["sasrec"]], axis=1), users)
    for metric in ("ndcg", "hr"):
        column = METRICS.index(metric)
        ours = samples[:, column]
        theirs = samples[:, column + len(METRICS)]
        if not theirs.all():
            print(f"no gain in {metric}: in a resample SASRec has no hit at all")
            continue
        low, high = interval(ours / theirs - 1)
        gain = metrics[f"{metric}10_hstu"] / metrics[f"{metric}10_sasrec"] - 1
        metrics |= {f"{metric}10_gain": gain, f"{metric}10_gain_ci_low": low, f"{metric}10_gain_ci_high": high}
    return {name: round(float(value), 5) for name, value in metrics.items()}


def _mean_gains(tests: list[Outcome], model: str) -> np.ndarray:
    """Return float64 [events, 3]: each event's gains at 10, averaged over the seeds."""
    return np.mean([gains(np.array(test.ranks[ALL_ITEMS]), 10) for test in tests if test.model == model], axis=0)


def _test_rows(tests: Iterable[Outcome]) -> list[dict[str, Cell]]:
    """Return one row per model, seed and set of candidates."""
    return [
        {
            "kind": "test",
            "model": test.model,
            "protocol": f"newest events, {candidates}",
            "seed": test.seed,
            "events": len(ranks),
            "epoch": test.epoch,
            "options": msgspec.json.encode(test.options).decode(),
            **_at_cutoffs(np.array(ranks)),
            "seconds": round(test.seconds, 1),
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
        }
        for trial in trials
    ]


def _space_rows() -> list[dict[str, Cell]]:
    """Return the values that the random search draws from, uniformly."""
    return [
        {"kind": "space", "model": model, "option": option, "values": ", ".join(map(str, values))}
        for model, contender in CONTENDERS.items()
        for option, values in contender.space.items()
    ]
