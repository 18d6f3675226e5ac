"""The stages of an accuracy benchmark and their command line.

--stage tune    random search: every contender with options gets the same number of trials
--stage test    each contender's best trial, trained on all events before the split, several seeds where it has any
--stage report  metrics, intervals and all trials in one result file

Every trial and test is a file in the folder --out as soon as it is there, and is not computed again: a stage that was
stopped, or that ran out of --minutes, continues with the same command. A stage needs the one before it complete.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from pipeline.evaluation.metrics import RankingMetrics
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import Benchmark
from tests.benchmarks.accuracy_report import report
from tests.benchmarks.accuracy_runs import Outcome, Trial, run_test, run_trial
from tests.benchmarks.accuracy_setting import Options
from tests.benchmarks.workers import Job, run_saved, save

Record = TypeVar("Record", Trial, Outcome)

# Names of options in result files that were written before they changed.
RENAMED = {"trainer.crop_events": "trainer.crop_length", "trainer.batch_events": "trainer.events_per_batch"}


def tune(benchmark: Benchmark, folder: Path, workers: int, minutes: float | None) -> None:
    jobs = _trial_jobs(benchmark, folder, results.this_stage("tune"))
    _require_all(run_saved(jobs, workers, minutes), "trials")


def run_tests(benchmark: Benchmark, folder: Path, workers: int, minutes: float | None) -> None:
    """Test each contender's best trial, and its variants that differ from it."""
    _require_all(sum(not path.exists() for path in _trial_jobs(benchmark, folder)), "trials")
    jobs = _test_jobs(benchmark, folder, results.this_stage("test"))
    _require_all(run_saved(jobs, workers, minutes), "tests")


def write_report(benchmark: Benchmark, folder: Path, result_folder: Path) -> None:
    jobs = _test_jobs(benchmark, folder)
    _require_all(sum(not path.exists() for path in jobs), "tests")
    tests = [msgspec.json.decode(path.read_bytes(), type=Outcome) for path in jobs]
    report(benchmark, read(folder, "trial", Trial), tests, result_folder)


def best_trials(folder: Path) -> dict[str, Trial]:
    """Return each contender's trial with the highest NDCG@10 on the validation events."""
    best: dict[str, Trial] = {}
    for trial in read(folder, "trial", Trial):
        if trial.model not in best or trial.metrics.ndcg > best[trial.model].metrics.ndcg:
            best[trial.model] = trial
    return best


def import_trials(path: Path, commit: str, folder: Path) -> None:
    """Write the trials that a result file records, which ran at `commit`, to the folder: tests can then go on."""
    result = results.load(path)
    stage = results.Stage("tune", commit, result.command, result.hardware, result.created)
    for row in result.rows:
        if row["kind"] == "trial":
            options = msgspec.json.decode(str(row["options"]), type=Options)
            options = {RENAMED.get(name, name): value for name, value in options.items()}
            hit_rate, ndcg, seconds = (float(row[name] or 0) for name in ("hr10", "ndcg10", "seconds"))
            metrics = RankingMetrics(0, hit_rate, ndcg, 0.0)
            trial = Trial(
                str(row["model"]), int(row["trial"] or 0), options, int(row["epoch"] or 0), metrics, seconds, stage
            )
            save(_trial_path(folder, trial.model, trial.number), trial)


def read(folder: Path, kind: str, record: type[Record]) -> list[Record]:
    return [msgspec.json.decode(path.read_bytes(), type=record) for path in sorted(folder.glob(f"{kind}-*.json"))]


def _trial_jobs(benchmark: Benchmark, folder: Path, stage: results.Stage | None = None) -> dict[Path, Job]:
    """Return every trial of every contender by its file; a small space has fewer trials than a large one."""
    return {
        _trial_path(folder, model, number): (run_trial, benchmark.setting, model, contender, number, stage)
        for number in range(benchmark.trials)
        for model, contender in benchmark.contenders.items()
        if number < contender.size
    }


def _test_jobs(benchmark: Benchmark, folder: Path, stage: results.Stage | None = None) -> dict[Path, Job]:
    """Return the tests by their files: the contenders, then the variants; those with seeds once per seed."""
    best = best_trials(folder)
    rankings: dict[str, tuple[str, Options]] = {model: (model, {}) for model in benchmark.contenders}
    for name, (model, changes) in benchmark.variants.items():
        if best[model].options | changes != best[model].options:
            rankings[name] = model, changes
    jobs: dict[Path, Job] = {}
    for name, (model, changes) in rankings.items():
        contender = benchmark.contenders[model]
        for seed in range(benchmark.seeds if contender.is_trained else 1):
            path = folder / f"test-{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            options = best[model].options | changes
            jobs[path] = (run_test, benchmark.setting, name, contender, seed, options, best[model].epoch, stage)
    return jobs


def _trial_path(folder: Path, model: str, number: int) -> Path:
    return folder / f"trial-{model}-{number}.json"


def _require_all(missing: int, what: str) -> None:
    if missing:
        raise SystemExit(f"{missing} {what} are missing: run their stage again, it continues where it stopped")


def main(benchmark: Benchmark, quick: Benchmark, description: str | None) -> None:
    """Run the command line. quick: the benchmark with --quick, whose result stays in --out."""
    args = _parse(benchmark, description)
    variants = {name: benchmark.variants[name] for name in args.variants}
    chosen = quick if args.quick else replace(benchmark, trials=args.trials, seeds=args.seeds, variants=variants)
    result_folder = args.out if args.quick else results.FOLDER
    stages: dict[str, Callable[[], None]] = {
        "tune": partial(tune, chosen, args.out, args.workers, args.minutes),
        "test": partial(run_tests, chosen, args.out, args.workers, args.minutes),
        "report": partial(write_report, chosen, args.out, result_folder),
    }
    if args.trials_of:
        import_trials(args.trials_of, args.trials_commit, args.out)
    selected: Iterable[str] = stages if args.stage == "all" else [args.stage]
    for stage in selected:
        start_s = time.monotonic()
        stages[stage]()
        print(f"{stage}: {time.monotonic() - start_s:.0f} s", flush=True)


def _parse(benchmark: Benchmark, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["tune", "test", "report", "all"], default="all", help="stage to run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of trials and tests")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes, on one GPU or on the cores")
    parser.add_argument("--minutes", type=float, help="start no trial or test after this many minutes of a stage")
    trials_help = f"trials per contender (default {benchmark.trials})"
    parser.add_argument("--trials", type=int, default=benchmark.trials, help=trials_help)
    seeds_help = f"seeds per trained ranking (default {benchmark.seeds})"
    parser.add_argument("--seeds", type=int, default=benchmark.seeds, help=seeds_help)
    names = list(benchmark.variants)
    variants_help = f"ablations to test (default all: {'; '.join(names)})"
    parser.add_argument("--variants", nargs="*", choices=names, default=names, metavar="NAME", help=variants_help)
    parser.add_argument("--trials-of", type=Path, metavar="FILE", help="result file whose trials to take over first")
    parser.add_argument("--trials-commit", default="", metavar="COMMIT", help="commit at which those trials ran")
    parser.add_argument("--quick", action="store_true", help="few users, trials and epochs, to see that it runs")
    args = parser.parse_args()
    if args.trials_of and not args.trials_commit:
        parser.error("--trials-of needs --trials-commit")
    return args
