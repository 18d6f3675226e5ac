"""The demo in small: simulated, trained, streamed; without a broker, then through one over the files of that run."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from worker.cli import main
from worker.commands import demo
from worker.replay.local_servers import missing_requirement
from worker.replay.report import ReplayReport

EVENTS = 1000


class Result(NamedTuple):
    folder: Path
    report: ReplayReport
    out: str
    err: str

    @property
    def listed_files(self) -> list[Path]:
        lines = self.out.rpartition("files")[2].splitlines()
        return [Path(line.split()[0]) for line in lines if line.startswith("  ")]


def run_demo(folder: Path) -> Result:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main(["demo", "--out", str(folder), "--events", str(EVENTS), "--rate", "2000"]) == 0
    for name in ("shop/events.jsonl", "shop/items.jsonl", "shop/truth.json", "artifact/manifest.json"):
        assert (folder / name).stat().st_size > 0
    report = msgspec.json.decode((folder / "report.json").read_bytes(), type=ReplayReport)
    return Result(folder, report, out.getvalue(), err.getvalue())


def check_report(report: ReplayReport) -> None:
    assert (report.events, report.slates, report.lost) == (EVENTS, EVENTS, 0)
    assert report.strategies == {"hstu": EVENTS}
    assert sum(report.backends.values()) == EVENTS
    assert set(report.hit_rates) == {"slate", "cooccurrence", "popularity"}
    assert report.latency.p99_ms >= report.latency.p50_ms > 0


@pytest.fixture(scope="module", autouse=True)
def one_epoch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", 1)
        yield


@pytest.fixture(scope="module")
def without_broker(tmp_path_factory: pytest.TempPathFactory, one_epoch: None) -> Result:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLRACE_KAFKA_HOME", str(folder / "nowhere"))
        return run_demo(folder / "out")


def test_demo_without_a_broker_says_so_and_streams_the_log(without_broker: Result) -> None:
    check_report(without_broker.report)
    assert without_broker.report.source == "log"
    assert "no broker:" in without_broker.out
    assert {file for file in without_broker.folder.iterdir() if file.is_file()} <= set(without_broker.listed_files)
    assert all(file.exists() for file in without_broker.listed_files)


def test_demo_streams_through_a_broker_over_the_files_of_a_run_before(without_broker: Result) -> None:
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    result = run_demo(without_broker.folder)
    check_report(result.report)
    assert result.report.source == "kafka"
    assert result.err == ""
    assert f"{EVENTS:,} from kafka; 0 dead letters" in result.out
    listed = result.out.rpartition("files")[2]
    assert "report.json" in listed
    assert "slates.jsonl" not in listed
