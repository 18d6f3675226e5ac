"""A log through the whole worker, judged: what a replay reports is what the evaluation of the same log says."""

import re
from pathlib import Path

import msgspec
import pytest

from pipeline.records import Slate
from tests.kafka.broker import Broker
from worker.cli import main
from worker.replay.child_process import free_ports
from worker.replay.replay import ReplayReport

SETTINGS = {
    "as it comes": {},
    "some actions exclude": {"PIPELINE__EXCLUDE_ACTIONS": '["cart", "purchase"]', "SEQUENCES__MAX_EVENTS": "20"},
    "exclusion ends": {"PIPELINE__EXCLUDE_WINDOW_DAYS": "3"},
}


def replayed(shop, folder: Path, *more: object) -> ReplayReport:
    words = [
        shop.log,
        "--artifact",
        shop.artifact,
        "--report",
        folder / "r.json",
        "--slates",
        folder / "s.jsonl",
        *more,
    ]
    assert main(["replay", *map(str, words)]) == 0
    return msgspec.json.decode((folder / "r.json").read_bytes(), type=ReplayReport)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_slates_hit_as_often_as_the_evaluation_of_their_rankings(shop, tmp_path: Path, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(f"MILLRACE__{name}", value)
    report = replayed(shop, tmp_path)
    assert main(["evaluate", str(shop.artifact), str(shop.log), "--report", str(tmp_path / "e.json")]) == 0
    evaluated = msgspec.json.decode((tmp_path / "e.json").read_bytes())
    assert report.scored == evaluated["events"]
    assert report.scored_fraction == 1.0
    wanted = {name: row["at"]["10"]["hit_rate"]["value"] for name, row in evaluated["rankings"].items()}
    assert report.hit_rates == pytest.approx(
        {"slate": wanted["hstu"], "cooccurrence": wanted["cooccurrence"], "popularity": wanted["popularity"]}, abs=1e-5
    )
    assert report.hit_rates["slate"] > 0


def test_a_replay_answers_every_event_and_leaves_slates_and_a_summary(shop, tmp_path: Path, capsys):
    report = replayed(shop, tmp_path, "--limit", 1000)
    assert (report.events, report.slates, report.lost, report.dead_letters) == (1000, 1000, 0, 0)
    assert report.strategies == {"hstu": 1000}
    times_ms = sorted(msgspec.json.decode(line)["ts_ms"] for line in shop.log.read_bytes().splitlines())[:1000]
    assert report.log_speed == pytest.approx((times_ms[-1] - times_ms[0]) / 1e3 / report.elapsed_s, rel=0.01)
    slates = [msgspec.json.decode(line, type=Slate) for line in (tmp_path / "s.jsonl").read_bytes().splitlines()]
    assert sorted(slate.covers.first_offset for slate in slates) == list(range(1000))
    summary = capsys.readouterr().out
    assert "1,000 from log; 0 dead letters" in summary
    assert "hit rate@10, cooccurrence" in summary


def test_a_replay_through_kafka_reports_the_same_hits(shop, tmp_path: Path, kafka: str):
    direct = replayed(shop, tmp_path)
    report = replayed(shop, tmp_path, "--kafka", kafka)
    assert (report.source, report.slates, report.lost) == ("kafka", report.events, 0)
    assert report.hit_rates == pytest.approx(direct.hit_rates, abs=1e-5)


def test_a_replay_through_a_deployments_broker_keeps_to_its_own_topics_and_group(
    shop, tmp_path: Path, kafka: str, topics, run, monkeypatch, capsys
):
    broker = Broker(kafka, topics)
    deployed = [run(broker.topic(kind=kind)) for kind in ("events", "recommendations", "events.dead")]
    for key, topic in zip(("EVENTS_TOPIC", "RECOMMENDATIONS_TOPIC", "DEAD_LETTER_TOPIC"), deployed, strict=True):
        monkeypatch.setenv(f"MILLRACE__KAFKA__{key}", topic)
    run(broker.produce(deployed[0], [b"{}"]))
    assert replayed(shop, tmp_path, "--kafka", broker.bootstrap, "--limit", 100).dead_letters == 0
    printed = capsys.readouterr().out
    (name,) = set(re.findall(r"replay-[0-9a-f]{8}", printed))
    assert f"{name}.events, {name}.recommendations, {name}.events.dead; group {name}\n" in printed
    assert len(run(broker.read(f"{name}.events", 100))) == 100
    assert len(run(broker.read(f"{name}.recommendations", 100))) == 100
    assert [len(run(broker.read(topic, 0))) for topic in deployed] == [1, 0, 0]


def test_a_replay_through_a_broker_that_is_away_ends_as_soon_as_every_command(
    shop, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr("worker.kafka.client.CLI_START_TIMEOUT_S", 1.0)
    words = [shop.log, "--kafka", f"127.0.0.1:{free_ports(1)[0]}", "--report", tmp_path / "r.json", "--limit", 50]
    assert main(["replay", *map(str, words)]) == 4
    assert "within 1 s" in capsys.readouterr().err


def test_without_an_artifact_the_counters_answer_and_are_judged_alone(shop, tmp_path: Path):
    words = [shop.log, "--report", tmp_path / "r.json", "--slates", tmp_path / "s.jsonl"]
    assert main(["replay", *map(str, words)]) == 0
    report = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=ReplayReport)
    assert report.strategies == {"simple": report.events}
    assert list(report.hit_rates) == ["slate"]


def test_bad_lines_are_buried_and_nothing_else_is_missing(shop, tmp_path: Path):
    good = shop.log.read_bytes().splitlines()[:300]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(b"\n".join([*good[:100], b"{", b'{"user_id": "u1"}', *good[100:]]) + b"\n")
    words = [mixed, "--report", tmp_path / "r.json", "--slates", tmp_path / "s.jsonl"]
    assert main(["replay", *map(str, words)]) == 0
    report = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=ReplayReport)
    assert (report.events, report.slates, report.dead_letters, report.lost) == (300, 300, 2, 0)
    assert len((tmp_path / "s.dead.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("through_kafka", [False, True])
def test_events_of_an_unknown_action_are_buried_not_lost(shop, tmp_path: Path, request, through_kafka: bool):
    lines = [msgspec.json.decode(line) for line in shop.log.read_bytes().splitlines()[:50]]
    for line in lines[10:13]:
        line["action"] = "dance"
    log = tmp_path / "dancing.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    more = ["--kafka", request.getfixturevalue("kafka")] if through_kafka else []
    words = [log, "--report", tmp_path / "r.json", "--slates", tmp_path / "s.jsonl", *more]
    assert main(["replay", *map(str, words)]) == 0
    report = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=ReplayReport)
    assert (report.events, report.slates, report.dead_letters, report.lost) == (50, 47, 3, 0)


def test_every_action_is_answered_and_scored_whatever_triggers_in_production(shop, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MILLRACE__EVENTS__TRIGGER_ACTIONS", '["purchase"]')
    report = replayed(shop, tmp_path, "--limit", 100)
    assert (report.slates, report.lost, report.scored_fraction) == (100, 0, 1.0)


@pytest.mark.parametrize(("text", "why"), [("", "it is empty"), ("no event\n", "look at its first lines")])
def test_a_log_without_events_is_one_sentence(text: str, why: str, tmp_path: Path, capsys):
    (tmp_path / "log.jsonl").write_text(text)
    assert main(["replay", str(tmp_path / "log.jsonl")]) == 2
    assert f"no event in it could be read; {why}" in capsys.readouterr().err
