"""`millrace simulate` from the command line."""

from pathlib import Path

import msgspec
import pytest

from pipeline.data.log_io import read_log
from pipeline.records import Event, Item
from pipeline.simulation.ground_truth import GroundTruth
from worker.cli import main


def test_simulate_writes_a_gzipped_log_its_items_and_the_ground_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--events", "1500", "--users", "60", "--items", "120", "--seed", "3"]
    assert main(["simulate", "--out", str(tmp_path), "--gzip", *size]) == 0
    log = list(read_log(tmp_path / "events.jsonl.gz"))
    items = [msgspec.json.decode(line, type=Item) for line in (tmp_path / "items.jsonl").read_bytes().splitlines()]
    truth = msgspec.json.decode((tmp_path / "truth.json").read_bytes(), type=GroundTruth)
    assert len(log) == truth.events == 1500
    assert truth.config.seed == 3
    assert len(items) == 120
    assert all(isinstance(event, Event) for event in log)
    assert {event.item_id for event in log if isinstance(event, Event)} <= {item.item_id for item in items}
    assert f"{truth.hit_rate:.4f}" in capsys.readouterr().out


def test_fewer_items_than_topics_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--out", str(tmp_path / "shop"), "--items", "20"]) == 2
    assert "--items 20" in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()
