"""Stages of an accuracy benchmark: they continue where they stopped, in their order, from trials of earlier results."""

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pipeline.data.log_io import write_log
from pipeline.records import Event
from tests.benchmarks import accuracy, beauty, results
from tests.benchmarks.accuracy_models import Benchmark
from tests.benchmarks.accuracy_runs import Trial
from tests.benchmarks.accuracy_stages import best_trials, import_trials, read, run_tests, tune, write_report

needs_data = pytest.mark.skipif(not beauty.SETTING.log.exists(), reason="needs MILLRACE_DATA with amazon/beauty")


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    """Two baselines of the Beauty benchmark on a small log, three and one trials."""
    rng = np.random.default_rng(0)
    events = [Event(f"u{n % 20}", f"i{rng.integers(50)}", "rate", 60_000 * n) for n in range(400)]
    write_log(tmp_path / "log.jsonl", events)
    contenders = {name: beauty.BENCHMARK.contenders[name] for name in ("itemknn", "popularity")}
    setting = msgspec.structs.replace(beauty.SETTING, log=tmp_path / "log.jsonl", device="cpu")
    return replace(beauty.BENCHMARK, setting=setting, contenders=contenders, variants={}, gains=(), trials=3)


def test_stopped_stage_continues_with_the_jobs_that_have_no_file(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="4 trials are missing"):
        tune(benchmark, tmp_path, 1, minutes=0)
    with pytest.raises(SystemExit, match="4 trials are missing"):
        run_tests(benchmark, tmp_path, 1, None)
    tune(benchmark, tmp_path, 1, None)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trial-*.json")}
    assert len(times) == 4
    (tmp_path / "trial-itemknn-1.json").unlink()
    tune(benchmark, tmp_path, 1, None)
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["trial-itemknn-1.json"]
    with pytest.raises(SystemExit, match="2 tests are missing"):
        write_report(benchmark, tmp_path, tmp_path)
    run_tests(benchmark, tmp_path, 1, None)
    write_report(benchmark, tmp_path, tmp_path)
    result = results.load(tmp_path / "beauty.json")
    assert [stage.stage for stage in result.stages] == ["tune", "test", "report"]
    assert all(stage.commit == result.commit for stage in result.stages)
    assert {row["commit"] for row in result.rows if row["kind"] in ("trial", "test")} == {result.commit}
    assert [row["model"] for row in result.rows if row["kind"] == "published"][3] == "HSTU"


def test_trials_of_an_earlier_result_are_taken_over_with_their_commit(tmp_path: Path) -> None:
    import_trials(results.FOLDER / "accuracy.json", "0123456789ab", tmp_path)
    trials = read(tmp_path, "trial", Trial)
    rows = [row for row in results.load(results.FOLDER / "accuracy.json").rows if row["kind"] == "trial"]
    assert len(trials) == len(rows)
    assert {trial.stage.commit for trial in trials} == {"0123456789ab"}
    best = best_trials(tmp_path)["hstu"]
    assert best.metrics.ndcg == max(float(row["ndcg10"] or 0) for row in rows if row["model"] == "hstu")
    assert best.options.keys() == accuracy.HSTU.keys()


@needs_data
def test_dry_run_goes_through_all_stages_on_the_real_log(tmp_path: Path) -> None:
    quick = replace(beauty.QUICK, setting=msgspec.structs.replace(beauty.QUICK.setting, users=30, device="cpu"))
    workers = min(2, os.cpu_count() or 1)
    tune(quick, tmp_path, workers, None)
    run_tests(quick, tmp_path, workers, None)
    write_report(quick, tmp_path, tmp_path)
    metrics = results.load(tmp_path / "beauty.json").metrics
    names = {f"{metric}10_{model}" for metric in ("hr", "ndcg") for model in ("hstu", "hstu_contents", "sasrec")}
    assert names <= metrics.keys()
    assert 0 < metrics["tied_share"] < 1
