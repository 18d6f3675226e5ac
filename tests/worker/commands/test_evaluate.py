"""`millrace train` and `millrace evaluate`, from a log's lines to the report."""

from pathlib import Path
from shutil import copytree

import msgspec
import numpy as np
import pytest

from pipeline.evaluation.evaluate import EvaluationReport
from pipeline.manifest import FORMAT, MANIFEST
from worker.cli import main

Capture = pytest.CaptureFixture[str]
SMALL_MODEL = ["--epochs", "1", "--width", "8", "--layers", "1", "--heads", "1"]


def write_clicks(folder: Path, *more_lines: str, clicks: int = 600) -> Path:
    """Write users and items of clicks in their order, without times."""
    rng = np.random.default_rng(0)
    lines = [f"u{rng.integers(20)};i{rng.integers(30)}" for _ in range(clicks)]
    path = folder / "clicks.csv"
    path.write_text("\n".join([*lines, *more_lines]))
    return path


def words(*parts: object) -> list[str]:
    return [str(part) for part in parts]


def test_log_without_times_is_evaluated_on_each_users_newest_events(tmp_path: Path, capsys: Capture) -> None:
    log = write_clicks(tmp_path)
    layout = ["--columns", "user,item", "--separator", ";", "--action", "click"]
    assert main(words("train", log, *layout, "--out", tmp_path / "a", "--leave-last-out", 3, *SMALL_MODEL)) == 0
    protocol = ["--protocol", "leave-last-out", "--leave-last-out", 3, "--cutoffs", "1,10"]
    assert main(words("evaluate", tmp_path / "a", log, *layout, *protocol, "--report", tmp_path / "report.json")) == 0
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=EvaluationReport)
    assert (report.events, report.users, report.split, report.warning) == (60, 20, "each user's newest 3", None)
    assert list(report.rankings["hstu"].at) == [1, 10]
    shown = capsys.readouterr().out
    assert all(f"\n {name} " in shown for name in report.rankings)
    assert f"{report.rankings['itemknn'].at[10].ndcg.value:.4f}" in shown
    assert main(words("evaluate", tmp_path / "a", log, *layout)) == 2
    assert "events to score" in capsys.readouterr().err


def test_unreadable_records_are_reported_and_skipped(tmp_path: Path, capsys: Capture) -> None:
    log = write_clicks(tmp_path, "u1", "u2;", clicks=100)
    layout = ["--columns", "user,item", "--separator", ";"]
    assert main(words("train", log, *layout, "--out", tmp_path / "a", "--no-refit", *SMALL_MODEL)) == 0
    assert "2 records cannot be read, the first: line 101: 1 columns" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train LOG --out x", "evaluate ARTIFACT LOG"])
def test_log_without_an_event_is_one_sentence(command: str, shop, tmp_path: Path, capsys: Capture) -> None:
    nan = '{"user_id": "u", "item_id": "i", "action": "view", "ts_ms": 1, "value": NaN}'
    for content, reason in [
        ("", "it is empty"),
        ('{"user_id": 1}\n', "1 record cannot be read: line 1"),
        (nan, "line 1: not an event: JSON is malformed: invalid character (byte 72), at 'NaN}'"),
    ]:
        (tmp_path / "log.jsonl").write_text(content)
        line = command.replace("LOG", str(tmp_path / "log.jsonl")).replace("ARTIFACT", str(shop.artifact))
        assert main(line.split()) == 2
        err = capsys.readouterr().err.strip()
        assert "no event in it could be read" in err
        assert reason in err
        assert "\n" not in err


@pytest.mark.parametrize("command", ["train LOG --warm-start ARTIFACT --out x", "evaluate ARTIFACT LOG"])
def test_artifact_of_another_format_is_one_sentence(command: str, shop, tmp_path: Path, capsys: Capture) -> None:
    old = copytree(shop.artifact, tmp_path / "old")
    manifest = msgspec.json.decode((old / MANIFEST).read_bytes())
    (old / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"format": FORMAT - 1}))
    assert main(command.replace("LOG", str(shop.log)).replace("ARTIFACT", str(old)).split()) == 3
    err = capsys.readouterr().err.strip()
    assert err.endswith(f"format {FORMAT - 1}, this millrace reads {FORMAT}; train again")
    assert "\n" not in err


@pytest.mark.parametrize("command", ["train LOG --out x", "evaluate ARTIFACT LOG"])
def test_full_vocabulary_is_one_sentence(command: str, shop, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE__COUNTERS__MAX_ITEMS", "5")
    assert main(command.replace("LOG", str(shop.log)).replace("ARTIFACT", str(shop.artifact)).split()) == 2
    err = capsys.readouterr().err.strip()
    assert err.endswith("have no token: all 5 are taken; counters.max_items is 5: set it higher")
    assert "\n" not in err


def test_negatives_are_configured_by_number_seed_and_sampling(shop, tmp_path: Path, capsys: Capture) -> None:
    negatives = ["--negatives", 20, "--negative-sampling", "popularity", "--seed", 4]
    assert main(words("evaluate", shop.artifact, shop.log, *negatives, "--report", tmp_path / "report.json")) == 0
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=EvaluationReport)
    assert report.candidates == "20 popularity negatives, seed 4"
    assert "among 20 popularity negatives, seed 4" in capsys.readouterr().out


def test_zero_hit_rates_come_with_their_reason(tmp_path: Path, capsys: Capture) -> None:
    """Each user alternates between two items, so whatever comes next was touched before and is excluded."""
    log = tmp_path / "habits.csv"
    log.write_text("".join(f"u{user},i{(7 * user + step % 2) % 40}\n" for step in range(30) for user in range(30)))
    layout = ["--columns", "user,item"]
    assert main(words("train", log, *layout, "--out", tmp_path / "a", "--no-refit", *SMALL_MODEL)) == 0
    assert "36 of 36 scored items are excluded from their user's slates" in capsys.readouterr().out
    assert main(words("evaluate", tmp_path / "a", log, *layout, "--report", tmp_path / "report.json")) == 0
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=EvaluationReport)
    assert (report.excluded, report.events, report.tied_fraction) == (180, 180, 0)
    assert "180 of 180 scored items are excluded" in capsys.readouterr().out
    assert all(ranking.at[10].hit_rate.value == 0 for ranking in report.rankings.values())


def test_share_of_tied_events_is_said_and_the_untied_ones_are_scored_apart(tmp_path: Path, capsys: Capture) -> None:
    """A page of four events has one time; the first of each page is untied."""
    rng = np.random.default_rng(1)
    log = tmp_path / "pages.csv"
    rows = [(user, rng.integers(30), page) for page in range(12) for user in range(20) for _ in range(4)]
    log.write_text("user,item,ts\n" + "".join(f"u{user},i{item},{1_700_000_000 + page}\n" for user, item, page in rows))
    train = words("train", log, "--out", tmp_path / "a", "--leave-last-out", 8, "--no-refit", *SMALL_MODEL)
    assert main(train) == 0
    protocol = ["--protocol", "leave-last-out", "--leave-last-out", 8]
    assert main(words("evaluate", tmp_path / "a", log, *protocol, "--report", tmp_path / "report.json")) == 0
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=EvaluationReport)
    assert report.tied_fraction == 0.75
    assert all(ranking.slices["untied"].events == 40 for ranking in report.rankings.values())
    assert "75.0% of the scored events have the time of their user's event before" in capsys.readouterr().out
