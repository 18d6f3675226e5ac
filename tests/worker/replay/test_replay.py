"""A log through the whole worker, scored: a replay reports what the evaluation of the same log reports."""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.slates import Slate
from tests.kafka.broker import Broker
from worker.cli import main
from worker.errors import StoreUnavailable
from worker.redis.client import Command, RedisClient
from worker.redis.functions import PUSH
from worker.replay.report import ReplayReport

SETTINGS = {
    "defaults": {},
    "some actions exclude": {"PIPELINE__EXCLUDE_ACTIONS": '["cart", "purchase"]', "SEQUENCES__MAX_EVENTS": "20"},
    "exclusion ends": {"PIPELINE__EXCLUDE_WINDOW_DAYS": "3"},
}


def replay(log: Path, folder: Path, *options: object) -> ReplayReport:
    outputs = ["--report", folder / "report.json", "--slates", folder / "slates.jsonl"]
    assert main(["replay", *map(str, [log, *outputs, *options])]) == 0
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=ReplayReport)


def replay_model(shop, folder: Path, *options: object, log: Path | None = None) -> ReplayReport:
    return replay(log or shop.log, folder, "--artifact", shop.artifact, *options)


@pytest.fixture(scope="module")
def log(shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The events of a third of the shop's users, about 2,000, to replay several times; some of a minute are tied."""
    events = [msgspec.json.decode(line) for line in shop.log.read_bytes().splitlines()]
    chosen = set(sorted({event["user_id"] for event in events})[::3])
    events = [event | {"ts_ms": event["ts_ms"] // 60_000 * 60_000} for event in events if event["user_id"] in chosen]
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines(events))
    return path


@pytest.fixture(scope="module")
def direct(shop, log: Path, tmp_path_factory: pytest.TempPathFactory) -> ReplayReport:
    """The log as its own source, with default settings."""
    return replay_model(shop, tmp_path_factory.mktemp("direct"), log=log)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replay_reports_the_hit_rates_of_the_evaluation(
    shop, log: Path, direct: ReplayReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"MILLRACE__{name}", value)
    report = replay_model(shop, tmp_path, log=log) if settings else direct
    assert main(["evaluate", str(shop.artifact), str(log), "--report", str(tmp_path / "evaluation.json")]) == 0
    evaluation = msgspec.json.decode((tmp_path / "evaluation.json").read_bytes())
    assert report.scored == evaluation["events"]
    assert report.scored_fraction == 1.0
    rates = {name: ranking["at"]["10"]["hit_rate"]["value"] for name, ranking in evaluation["rankings"].items()}
    expected = {"slate": rates["hstu"], "cooccurrence": rates["cooccurrence"], "popularity": rates["popularity"]}
    assert report.hit_rates == pytest.approx(expected, abs=1e-5)
    assert report.hit_rates["slate"] > 0
    assert report.excluded == evaluation["excluded"]
    assert 0.01 < report.tied_fraction < 0.9
    assert report.tied_fraction == pytest.approx(evaluation["tied_fraction"], abs=1e-6)
    untied = {name: ranking["slices"]["untied"]["hit_rate"] for name, ranking in evaluation["rankings"].items()}
    expected = {"slate": untied["hstu"], "cooccurrence": untied["cooccurrence"], "popularity": untied["popularity"]}
    assert report.untied_hit_rates == pytest.approx(expected, abs=1e-5)


def test_replay_answers_every_event_and_writes_slates_and_a_summary(
    shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = replay_model(shop, tmp_path, "--limit", 1000)
    assert (report.events, report.slates, report.lost, report.dead_letters) == (1000, 1000, 0, 0)
    assert report.strategies == {"hstu": 1000}
    assert report.backends == {"torch": 1000}
    times_ms = sorted(msgspec.json.decode(line)["ts_ms"] for line in shop.log.read_bytes().splitlines())[:1000]
    log_s = (times_ms[-1] - times_ms[0]) / 1e3
    assert log_s / report.log_speed == pytest.approx(report.elapsed_s, abs=0.0051)  # reported to the hundredth
    slates = [msgspec.json.decode(line, type=Slate) for line in (tmp_path / "slates.jsonl").read_bytes().splitlines()]
    assert sorted(slate.covers.first_offset for slate in slates) == list(range(1000))
    assert {(slate.strategy, slate.backend, slate.why) for slate in slates} == {("hstu", "torch", "best")}
    summary = capsys.readouterr().out
    assert "1,000 from log; 0 dead letters" in summary
    assert re.search(r"backends +torch 100\.0%", summary)
    assert "hit rate@10, cooccurrence" in summary


def test_replay_through_kafka_reports_the_same_hit_rates(
    shop, log: Path, direct: ReplayReport, tmp_path: Path, kafka: str
) -> None:
    report = replay_model(shop, tmp_path, "--kafka", kafka, log=log)
    assert (report.source, report.slates, report.lost) == ("kafka", report.events, 0)
    assert report.hit_rates == pytest.approx(direct.hit_rates, abs=1e-5)


async def test_replay_on_a_deployments_broker_uses_its_own_topics_and_group(
    shop,
    tmp_path: Path,
    kafka: str,
    topics: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broker = Broker(kafka, topics)
    deployed = [await broker.topic(kind=kind) for kind in ("events", "recommendations", "events.dead")]
    for key, topic in zip(("EVENTS_TOPIC", "RECOMMENDATIONS_TOPIC", "DEAD_LETTER_TOPIC"), deployed, strict=True):
        monkeypatch.setenv(f"MILLRACE__KAFKA__{key}", topic)
    await broker.produce(deployed[0], [b"{}"])
    report = await asyncio.to_thread(replay_model, shop, tmp_path, "--kafka", broker.bootstrap, "--limit", 100)
    assert report.dead_letters == 0
    printed = capsys.readouterr().out
    (name,) = set(re.findall(r"replay-[0-9a-f]{8}", printed))
    assert f"{name}.events, {name}.recommendations, {name}.events.dead; group {name}\n" in printed
    assert len(await broker.read(f"{name}.events", 100)) == 100
    assert len(await broker.read(f"{name}.recommendations", 100)) == 100
    assert [len(await broker.read(topic, 0)) for topic in deployed] == [1, 0, 0]


def test_replay_through_an_unreachable_broker_ends_after_the_commands_timeout(
    shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("worker.kafka.client.CLI_START_TIMEOUT_S", 1.0)
    options = ["--kafka", "127.0.0.1:1", "--report", tmp_path / "report.json", "--limit", 50]
    assert main(["replay", *map(str, [shop.log, *options])]) == 4
    assert "Kafka at 127.0.0.1:1 does not answer (for 1 s: " in capsys.readouterr().err


def test_replay_through_kafka_ends_with_the_error_of_an_event_that_cannot_be_produced(
    shop, tmp_path: Path, kafka: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shop.log.read_bytes().splitlines()[:50]
    event = msgspec.json.decode(lines[0])
    lines[25] = msgspec.json.encode(event | {"user_id": "u", "context": {"note": "x" * 1_100_000}})
    log = tmp_path / "large.jsonl"
    log.write_bytes(b"\n".join(lines) + b"\n")
    options = ["--kafka", kafka, "--report", tmp_path / "report.json"]
    assert main(["replay", *map(str, [log, *options])]) == 4
    assert "rejects the record" in capsys.readouterr().err


def test_replay_without_an_artifact_is_answered_by_counters_and_has_no_baselines(shop, tmp_path: Path) -> None:
    report = replay(shop.log, tmp_path, "--limit", 1000)
    assert report.strategies == {"simple": report.events}
    assert report.backends == {"numpy": report.events}
    assert list(report.hit_rates) == ["slate"]


def test_replay_begins_at_a_time(shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times_ms = sorted(msgspec.json.decode(line)["ts_ms"] for line in shop.log.read_bytes().splitlines())
    since = datetime.fromtimestamp(times_ms[-500] / 1000, UTC).isoformat()
    report = replay(shop.log, tmp_path, "--since", since)
    assert report.events == sum(ts_ms >= times_ms[-500] for ts_ms in times_ms)
    with pytest.raises(SystemExit):
        replay(shop.log, tmp_path, "--since", "yesterday")
    assert "want an ISO 8601 date or time" in capsys.readouterr().err


def test_unreadable_lines_are_dead_lettered_and_nothing_else_is_missing(shop, tmp_path: Path) -> None:
    lines = shop.log.read_bytes().splitlines()[:300]
    log = tmp_path / "mixed.jsonl"
    log.write_bytes(b"\n".join([*lines[:100], b"{", b'{"user_id": "u1"}', *lines[100:]]) + b"\n")
    report = replay(log, tmp_path)
    assert (report.events, report.slates, report.dead_letters, report.lost) == (300, 300, 2, 0)
    assert len((tmp_path / "slates.dead.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("through_kafka", [False, True])
def test_events_of_an_unknown_action_are_dead_lettered_not_lost(
    shop, tmp_path: Path, request: pytest.FixtureRequest, through_kafka: bool
) -> None:
    events = [msgspec.json.decode(line) for line in shop.log.read_bytes().splitlines()[:50]]
    for event in events[10:13]:
        event["action"] = "dance"
    log = tmp_path / "dancing.jsonl"
    log.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
    options = ["--kafka", request.getfixturevalue("kafka")] if through_kafka else []
    report = replay(log, tmp_path, *options)
    assert (report.events, report.slates, report.dead_letters, report.lost) == (50, 47, 3, 0)


def test_every_action_is_answered_and_scored_whatever_triggers_in_production(
    shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE__EVENTS__TRIGGER_ACTIONS", '["purchase"]')
    report = replay_model(shop, tmp_path, "--limit", 100)
    assert (report.slates, report.lost, report.scored_fraction) == (100, 0, 1.0)


@pytest.mark.parametrize(("text", "reason"), [("", "it is empty"), ("no event\n", "look at its first lines")])
def test_log_without_events_is_one_sentence(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    assert main(["replay", str(tmp_path / "log.jsonl")]) == 2
    assert f"no event in it could be read; {reason}" in capsys.readouterr().err


def test_events_whose_push_was_carried_out_but_not_answered_are_not_lost(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis' replies to the first push and to some later ones never arrive."""
    pipeline = RedisClient.pipeline
    pushes = 0

    async def lose_some_replies(client: RedisClient, commands: Sequence[Command]) -> list[Any]:
        nonlocal pushes
        replies = await pipeline(client, commands)
        if any(command[1] == PUSH.function for command in commands):
            pushes += 1
            if pushes % 2:
                raise StoreUnavailable("the reply is lost")
        return replies

    monkeypatch.setattr(RedisClient, "pipeline", lose_some_replies)
    monkeypatch.setenv("MILLRACE__REDIS__RETRY_BACKOFF_S", "0.001")
    report = replay(log, tmp_path, "--limit", 500)
    assert pushes > 1
    assert (report.events, report.slates, report.lost) == (500, 500, 0)
