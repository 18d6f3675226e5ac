"""The demo, small: simulated, trained, streamed, shown; through a real broker, and without one."""

from pathlib import Path

import msgspec
import pytest

from worker.cli import main
from worker.replay.local_servers import missing_requirement
from worker.replay.replay import ReplayReport

SMALL = ["--events", "3000", "--rate", "2000"]


def shown(folder: Path) -> ReplayReport:
    assert main(["demo", "--out", str(folder), *SMALL]) == 0
    for name in ("shop/events.jsonl", "shop/items.jsonl", "shop/truth.json", "artifact/manifest.json"):
        assert (folder / name).stat().st_size > 0
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=ReplayReport)


def whole(report: ReplayReport) -> None:
    assert (report.events, report.slates, report.lost) == (3000, 3000, 0)
    assert report.strategies == {"hstu": 3000}
    assert set(report.hit_rates) == {"slate", "cooccurrence", "popularity"}
    assert report.latency.p99_ms >= report.latency.p50_ms > 0


def test_the_demo_streams_through_a_broker_and_again_over_what_it_left(tmp_path: Path, capsys):
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    whole(shown(tmp_path))
    report = shown(tmp_path)
    whole(report)
    assert report.source == "kafka"
    out, said = capsys.readouterr()
    assert said == ""
    assert "3,000 from kafka; 0 dead letters" in out
    left = out.rpartition("files")[2]
    assert "report.json" in left
    assert "slates.jsonl" not in left


def test_without_a_broker_the_demo_says_so_and_streams_the_log(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("MILLRACE_KAFKA_HOME", str(tmp_path / "nowhere"))
    report = shown(tmp_path / "out")
    whole(report)
    assert report.source == "log"
    out = capsys.readouterr().out
    assert "no broker:" in out
    left = [line.split()[0] for line in out.partition("files")[2].splitlines() if line.startswith("  ")]
    assert {str(file) for file in (tmp_path / "out").iterdir() if file.is_file()} <= set(left)
    assert all(Path(name).exists() for name in left)
