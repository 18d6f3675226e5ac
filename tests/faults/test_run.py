"""`millrace run` that cannot start or go on: one clear sentence and its exit code; a second signal during a drain."""

import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer

from tests.faults.processes import launch, run_to_end
from tests.kafka.broker import Broker
from worker.cli import main
from worker.replay.local_servers import LocalValkey


class Ended(NamedTuple):
    returncode: int
    stderr: str


Start = Callable[..., Ended]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """Return `start(SECTION__KEY=value)`, which runs `millrace run` in this process until it ends."""
    monkeypatch.setattr("worker.system.malloc_tuning.trim_large_blocks", lambda: None)  # it lasts for the whole session
    monkeypatch.setattr("worker.stream.exit_guard.ExitGuard.start", lambda guard: None)  # it would end this process

    def run(*arguments: str, **settings: object) -> Ended:
        for key, value in {"HEALTH__PORT": 0, **settings}.items():
            monkeypatch.setenv(f"MILLRACE__{key}", str(value))
        return Ended(main(["run", *arguments]), capsys.readouterr().err)

    yield run
    logging.getLogger().handlers.clear()  # they write to the test's stderr


def sentence(done: Any) -> str:
    """Return the command's error: the last line of stderr, without a traceback before it."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_unknown_configuration_key_is_named(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[kafka]\nbrokers = 'x'\n")
    done = start("--config", str(file))
    assert done.returncode == 2
    assert "unknown field `brokers`" in sentence(done)


def test_unreachable_redis_is_reported(kafka: str, start: Start) -> None:
    done = start(KAFKA__BOOTSTRAP_SERVERS=kafka, REDIS__URL="redis://127.0.0.1:1", REDIS__START_TIMEOUT_S=0.1)
    assert done.returncode == 5
    assert "Redis at 127.0.0.1:1 is unreachable" in sentence(done)


def test_unreachable_broker_is_reported(valkey: str, start: Start) -> None:
    done = start(KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1", KAFKA__START_TIMEOUT_S=1, REDIS__URL=valkey)
    assert done.returncode == 4
    assert "127.0.0.1:1" in sentence(done)


def test_missing_topic_ends_the_process_with_its_name(kafka: str, valkey: str, topics: Callable[[str], str]) -> None:
    name = topics("nowhere")
    done = run_to_end(KAFKA__BOOTSTRAP_SERVERS=kafka, REDIS__URL=valkey, KAFKA__RECOMMENDATIONS_TOPIC=name)
    assert done.returncode == 4
    assert name in sentence(done)
    assert "create" in sentence(done)


def test_all_missing_topics_are_named_at_once(deployment: dict[str, str], valkey: str, start: Start) -> None:
    done = start(**{**deployment, "KAFKA__CREATE_TOPICS": "false"}, REDIS__URL=valkey)
    assert done.returncode == 4
    for key in ("EVENTS", "RECOMMENDATIONS", "DEAD_LETTER"):
        assert f"--create --topic {deployment[f'KAFKA__{key}_TOPIC']} " in sentence(done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_during_the_imports_ends_the_process_with_exit_code_0(
    number: signal.Signals,
    eventually: Callable[..., Awaitable[Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # each import is a line of stderr
    process = launch(log)
    try:
        await eventually(lambda: "asyncio.base_events" in log.read_text())
        process.send_signal(number)
        await eventually(lambda: process.poll() is not None)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "millrace run: stopped during the start, nothing was read" in log.read_text()
    assert "worker.stream.loop" not in log.read_text()


def test_artifact_without_a_manifest_is_reported(start: Start, tmp_path: Path) -> None:
    done = start(PIPELINE__ARTIFACT=tmp_path)
    assert done.returncode == 3
    assert "manifest.json: No such file" in sentence(done)


def test_flipped_byte_of_an_artifact_is_reported(shop, start: Start, tmp_path: Path) -> None:
    folder = shutil.copytree(shop.artifact, tmp_path / "artifact")
    weights = folder / "hstu.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = start(PIPELINE__ARTIFACT=folder)
    assert done.returncode == 3
    assert f"{weights}: SHA-256 is " in sentence(done)


async def test_topic_that_is_created_again_ends_a_running_worker_and_its_restart(
    deployment: dict[str, str],
    valkey: str,
    topics: Callable[[str], str],
    eventually: Callable[..., Awaitable[Any]],
    tmp_path: Path,
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    topic = deployment["KAFKA__EVENTS_TOPIC"]
    log = tmp_path / "log"
    worker = launch(log, **deployment, REDIS__URL=valkey)
    try:
        await eventually(lambda: '"partitions assigned"' in log.read_text())
        await broker.produce(topic, [b'{"user_id": "again", "item_id": "i", "action": "view", "ts_ms": 1}'])
        await eventually(lambda: broker.committed(topic, deployment["KAFKA__GROUP_ID"]))
        await broker.recreate(topic)
        await broker.produce(topic, [b'{"user_id": "again", "item_id": "n", "action": "view", "ts_ms": 2}'] * 3)
        await eventually(lambda: worker.poll() is not None)
    finally:
        worker.kill()
    assert worker.returncode == 8
    done = run_to_end(**deployment, REDIS__URL=valkey)
    assert done.returncode == 8
    assert "set sequences.topic_generation, now '1', to a value that was never used" in sentence(done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_exits_during_a_drain_that_cannot_end(
    number: signal.Signals,
    deployment: dict[str, str],
    eventually: Callable[..., Awaitable[Any]],
    tmp_path: Path,
) -> None:
    event = b'{"user_id": "u", "item_id": "i", "action": "view", "ts_ms": 1}'
    log = tmp_path / "log"
    with LocalValkey(tmp_path / "valkey") as server:
        redis = {"REDIS__URL": server.url, "REDIS__TIMEOUT_S": 0.2, "EVENTS__MAX_AGE_DAYS": 0}
        worker = launch(log, **deployment, **redis)
        try:
            await eventually(lambda: '"partitions assigned"' in log.read_text())
            os.kill(server.pid, signal.SIGSTOP)  # events admitted from now on cannot be answered
            async with AIOKafkaProducer(bootstrap_servers=deployment["KAFKA__BOOTSTRAP_SERVERS"]) as producer:
                await producer.send_and_wait(deployment["KAFKA__EVENTS_TOPIC"], event, key=b"u")
            await eventually(lambda: '"write failed, retrying"' in log.read_text())
            worker.send_signal(number)
            await eventually(lambda: '"draining"' in log.read_text())
            assert worker.poll() is None
            worker.send_signal(number)
            await eventually(lambda: worker.poll() is not None, 15)
        finally:
            os.kill(server.pid, signal.SIGCONT)
            worker.kill()
    assert worker.returncode == 128 + number
