"""HSTU compared with SASRec and four baselines on a real log (MILLRACE_DATA, default ../shared/data: MovieLens 100k).

Protocol: each user's latest ten events are left out of training and scored one after another, each ranked among all
items from all of its user's preceding events (and again among 100 uniform negatives, as older papers do). Every
contender is tuned by a seeded random search with the same number of trials, by NDCG@10 over the five latest events
before the scored ones. Then the two sequence models are trained on all events before the split with five seeds, and the
difference of their means over seeds is resampled by users. Popularity counts every training event equally.

The benchmark runs in stages, so that the trials can run on a GPU machine that has only torch, numpy, msgspec and
safetensors. Results that are in the folder already are not computed again:
    python -m tests.benchmarks.accuracy --stage tune --workers 12 --out DIR
    python -m tests.benchmarks.accuracy --stage test --workers 12 --out DIR
    python -m tests.benchmarks.accuracy --stage report --out DIR       writes results/accuracy.json
--quick runs all stages with few users, trials and epochs, to see that they run; its result stays in DIR.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from pathlib import Path
from typing import TypeVar

import msgspec

from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS, SEQUENCE_MODELS, VARIANTS, Options, Setting
from tests.benchmarks.accuracy_report import report
from tests.benchmarks.accuracy_runs import Outcome, Trial, run_test, run_trial
from tests.benchmarks.workers import pool

Record = TypeVar("Record", Trial, Outcome)

LOG = Path(os.environ.get("MILLRACE_DATA", "../shared/data")) / "ml-100k" / "ml-100k.inter"


def tune(setting: Setting, folder: Path, trials: int, workers: int) -> None:
    """Run every trial of every contender; one without options has a single trial."""
    numbers = [(model, n) for n in range(trials) for model, each in CONTENDERS.items() if each.space or n == 0]
    jobs = {folder / f"trial-{model}-{number}.json": (run_trial, setting, model, number) for model, number in numbers}
    _run(jobs, workers)


def test(setting: Setting, folder: Path, seeds: int, workers: int) -> None:
    """Test each contender's best trial: the sequence models and the variants of HSTU that differ once per seed."""
    best = best_trials(folder)
    runs: list[tuple[str, str, Options, int]] = [
        (model, model, {}, seed) for model in CONTENDERS for seed in range(seeds if model in SEQUENCE_MODELS else 1)
    ]
    tuned = best["hstu"].options
    variants = {name: changes for name, changes in VARIANTS.items() if tuned | changes != tuned}
    runs += [(name, "hstu", changes, seed) for name, changes in variants.items() for seed in range(seeds)]
    jobs: dict[Path, tuple] = {}
    for name, model, changes, seed in runs:
        path = folder / f"test-{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
        jobs[path] = (run_test, setting, model, seed, best[model].options | changes, best[model].epoch, name)
    _run(jobs, workers)


def best_trials(folder: Path) -> dict[str, Trial]:
    """Return each contender's trial with the highest NDCG@10 on the validation events."""
    best: dict[str, Trial] = {}
    for trial in read(folder, "trial", Trial):
        if trial.model not in best or trial.metrics.ndcg > best[trial.model].metrics.ndcg:
            best[trial.model] = trial
    return best


def read(folder: Path, kind: str, record: type[Record]) -> list[Record]:
    return [msgspec.json.decode(path.read_bytes(), type=record) for path in sorted(folder.glob(f"{kind}-*.json"))]


def _run(jobs: dict[Path, tuple], workers: int) -> None:
    """Write each job's result to its file, except those that exist."""
    waiting = {path: job for path, job in jobs.items() if not path.exists()}
    with pool(workers) as processes:
        running = {processes.submit(*job): path for path, job in waiting.items()}
        for number, done in enumerate(as_completed(running), 1):
            path = running[done]
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            draft.write_bytes(msgspec.json.encode(done.result()))
            draft.rename(path)
            print(f"{number}/{len(running)} {path.stem}: {done.result().seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["tune", "test", "report", "all"], default="all", help="stage to run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for trials and ranks")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes, on one GPU or on the cores")
    parser.add_argument("--trials", type=int, default=24, help="trials per contender (default 24)")
    seeds_help = "seeds per sequence model and variant (default 5)"
    parser.add_argument("--seeds", type=int, default=5, help=seeds_help)
    parser.add_argument("--quick", action="store_true", help="40 users, 2 trials, 1 epoch, 1 seed")
    args = parser.parse_args()
    setting = Setting(LOG.absolute())
    trials = args.trials
    seeds = args.seeds
    folder = results.FOLDER
    if args.quick:
        setting = msgspec.structs.replace(setting, users=40, max_epochs=1)
        trials = 2
        seeds = 1
        folder = args.out
    stages: dict[str, Callable[[], object]] = {
        "tune": lambda: tune(setting, args.out, trials, args.workers),
        "test": lambda: test(setting, args.out, seeds, args.workers),
        "report": lambda: report(read(args.out, "trial", Trial), read(args.out, "test", Outcome), folder),
    }
    chosen: Iterable[str] = stages if args.stage == "all" else [args.stage]
    for stage in chosen:
        start_s = time.monotonic()
        stages[stage]()
        print(f"{stage}: {time.monotonic() - start_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
