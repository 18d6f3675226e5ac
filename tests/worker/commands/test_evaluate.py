"""`millrace train` and `millrace evaluate` from a log's lines to the report."""

from pathlib import Path
from shutil import copytree

import msgspec
import numpy as np
import pytest

from pipeline.artifact import FORMAT, MANIFEST
from pipeline.evaluation.evaluate import EvaluationReport
from worker.cli import main

SMALL = ["--epochs", "1", "--width", "8", "--layers", "1", "--heads", "1"]


def order_log(folder: Path, *more: str) -> Path:
    """Who touched what, in order, without times."""
    random = np.random.default_rng(0)
    lines = [f"u{random.integers(20)};i{random.integers(30)}" for _ in range(600)]
    path = folder / "clicks.csv"
    path.write_text("\n".join([*lines, *more]))
    return path


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def test_a_log_without_times_is_trained_on_and_evaluated_by_each_users_newest_events(tmp_path: Path, capsys) -> None:
    log, report = order_log(tmp_path), tmp_path / "report.json"
    layout = ["--columns", "user,item", "--separator", ";", "--action", "click"]
    assert main(words("train", log, *layout, "--out", tmp_path / "a", "--leave-last-out", 3, *SMALL)) == 0
    told = ["--protocol", "leave-last-out", "--leave-last-out", 3, "--cutoffs", "1,10", "--report", report]
    assert main(words("evaluate", tmp_path / "a", log, *layout, *told)) == 0
    made = msgspec.json.decode(report.read_bytes(), type=EvaluationReport)
    assert (made.events, made.users, made.split, made.warning) == (60, 20, "each user's newest 3", None)
    assert list(made.rankings["hstu"].at) == [1, 10]
    shown = capsys.readouterr().out
    assert all(f"\n {name} " in shown for name in made.rankings)
    assert f"{made.rankings['itemknn'].at[10].ndcg.value:.4f}" in shown
    assert main(words("evaluate", tmp_path / "a", log, *layout)) == 2
    assert "taught artifact" in capsys.readouterr().err


def test_what_cannot_be_read_is_told_and_left_out(tmp_path: Path, capsys) -> None:
    log = order_log(tmp_path, "u1", "u2;")
    layout = ["--columns", "user,item", "--separator", ";"]
    assert main(words("train", log, *layout, "--out", tmp_path / "a", *SMALL)) == 0
    assert "2 records cannot be read, the first: line 601: 1 columns" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train LOG --out x", "evaluate ARTIFACT LOG"])
def test_a_log_without_an_event_is_one_sentence(command: str, shop, tmp_path: Path, capsys) -> None:
    nan = '{"user_id": "u", "item_id": "i", "action": "view", "ts_ms": 1, "value": NaN}'
    for content, said in [
        ("", "it is empty"),
        ('{"user_id": 1}\n', "1 records cannot be read, the first: line 1"),
        (nan, "line 1: not an event: JSON is malformed: invalid character (byte 72), at 'NaN}'"),
    ]:
        (tmp_path / "log.jsonl").write_text(content)
        line = command.replace("LOG", str(tmp_path / "log.jsonl")).replace("ARTIFACT", str(shop.artifact))
        assert main(line.split()) == 2
        err = capsys.readouterr().err.strip()
        assert "no event in it could be read" in err
        assert said in err
        assert "\n" not in err


@pytest.mark.parametrize("command", ["train LOG --warm-start ARTIFACT --out x", "evaluate ARTIFACT LOG"])
def test_an_artifact_of_another_version_is_one_sentence(command: str, shop, tmp_path: Path, capsys) -> None:
    old = copytree(shop.artifact, tmp_path / "old")
    manifest = msgspec.json.decode((old / MANIFEST).read_bytes())
    (old / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"format": FORMAT - 1}))
    assert main(command.replace("LOG", str(shop.log)).replace("ARTIFACT", str(old)).split()) == 3
    err = capsys.readouterr().err.strip()
    assert err.endswith(f"format {FORMAT - 1}, this millrace reads {FORMAT}; train again")
    assert "\n" not in err


@pytest.mark.parametrize("command", ["train LOG --out x", "evaluate ARTIFACT LOG"])
def test_a_catalogue_that_has_no_room_is_one_sentence(command: str, shop, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MILLRACE__COUNTERS__MAX_ITEMS", "5")
    assert main(command.replace("LOG", str(shop.log)).replace("ARTIFACT", str(shop.artifact)).split()) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith("have no token: all 5 are taken; counters.max_items is 5: set it higher")
    assert "\n" not in err


def test_negatives_are_asked_for_by_number_seed_and_kind(shop, tmp_path: Path, capsys) -> None:
    told = ["--negatives", 20, "--negative-sampling", "popularity", "--seed", 4, "--report", tmp_path / "r.json"]
    assert main(words("evaluate", shop.artifact, shop.log, *told)) == 0
    made = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=EvaluationReport)
    assert made.candidates == "20 popularity negatives, seed 4"
    assert "among 20 popularity negatives, seed 4" in capsys.readouterr().out
