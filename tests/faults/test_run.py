"""`millrace run` that cannot start: one clear sentence and its exit code; and one that is told twice to stop."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from worker.replay.local_servers import LocalValkey

COMMAND = [sys.executable, "-m", "worker.cli"]


def environment(values: dict[str, object]) -> dict[str, str]:
    return os.environ | {f"MILLRACE__{key}": str(value) for key, value in values.items()}


def start(*arguments: str, **values: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, "run", *arguments], env=environment({"HEALTH__PORT": 0, **values}), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def launched(values: dict[str, object], log: Path) -> subprocess.Popen:
    with log.open("wb") as out:
        return subprocess.Popen(
            [*COMMAND, "run"], env=environment({"HEALTH__PORT": 0} | values), stdout=out, stderr=out
        )


def sentence(done: subprocess.CompletedProcess) -> str:
    """The command's own last word: one line, and no traceback before it."""
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_an_unknown_key_of_the_configuration(tmp_path: Path):
    file = tmp_path / "m.toml"
    file.write_text("[kafka]\nbrokers = 'x'\n")
    done = start("--config", str(file))
    assert done.returncode == 2
    assert "unknown field `brokers`" in sentence(done)


def test_redis_is_down(kafka: str):
    done = start(KAFKA__BOOTSTRAP_SERVERS=kafka, REDIS__URL="redis://127.0.0.1:1")
    assert done.returncode == 5
    assert "Redis at 127.0.0.1:1 is unreachable" in sentence(done)


def test_no_broker_answers(valkey: str):
    done = start(KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1", KAFKA__START_TIMEOUT_S=1, REDIS__URL=valkey)
    assert done.returncode == 4
    assert "127.0.0.1:1" in sentence(done)


def test_a_topic_does_not_exist(kafka: str, valkey: str, topics: Callable[[str], str]):
    name = topics("nowhere")
    done = start(KAFKA__BOOTSTRAP_SERVERS=kafka, REDIS__URL=valkey, KAFKA__RECOMMENDATIONS_TOPIC=name)
    assert done.returncode == 4
    assert name in sentence(done)
    assert "create" in sentence(done)


def test_an_artifact_has_no_manifest(tmp_path: Path):
    done = start(PIPELINE__ARTIFACT=tmp_path)
    assert done.returncode == 3
    assert "manifest.json: No such file" in sentence(done)


def test_a_byte_of_an_artifacts_file_was_flipped(shop, tmp_path: Path):
    folder = shutil.copytree(shop.artifact, tmp_path / "artifact")
    weights = folder / "hstu.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = start(PIPELINE__ARTIFACT=folder)
    assert done.returncode == 3
    assert f"{weights}: SHA-256 is " in sentence(done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain_that_cannot_end(
    number: signal.Signals, kafka: str, topics: Callable[[str], str], run, eventually, tmp_path: Path
):
    names = {f"KAFKA__{kind}_TOPIC": topics(kind.lower()) for kind in ("EVENTS", "RECOMMENDATIONS", "DEAD_LETTER")}
    values = names | {
        "KAFKA__BOOTSTRAP_SERVERS": kafka,
        "KAFKA__GROUP_ID": topics("group"),
        "KAFKA__CREATE_TOPICS": "true",
    }
    event = b'{"user_id": "u", "item_id": "i", "action": "view", "ts_ms": 1}'

    async def story(server: LocalValkey) -> int:
        log = tmp_path / "log"
        redis: dict[str, object] = {"REDIS__URL": server.url, "REDIS__TIMEOUT_S": 0.2, "EVENTS__MAX_AGE_DAYS": 0}
        worker = launched(values | redis, log)
        await eventually(lambda: '"partitions assigned"' in log.read_text())
        os.kill(server.pid, signal.SIGSTOP)  # what is admitted now cannot be answered
        async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
            await producer.send_and_wait(names["KAFKA__EVENTS_TOPIC"], event, key=b"u")
        await eventually(lambda: '"write failed, retrying"' in log.read_text())
        worker.send_signal(number)
        await eventually(lambda: '"draining"' in log.read_text())
        assert worker.poll() is None
        worker.send_signal(number)
        await eventually(lambda: worker.poll() is not None, 5)
        return worker.returncode

    with LocalValkey(tmp_path / "valkey") as server:
        status = run(story(server))
        os.kill(server.pid, signal.SIGCONT)
    assert status == 128 + number
