"""`millrace doctor` tries every part for real, and names the next step for each gap."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker import config_file
from worker.cli import main
from worker.config import RedisConfig
from worker.redis.client import RedisClient
from worker.replay.local_servers import LocalValkey

Configure = Callable[..., None]
Lines = Callable[[], dict[str, str]]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Return `configure(SECTION__KEY=value)`."""

    def set_variables(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"MILLRACE__{name}", str(value))

    return set_variables


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """Return the printed finding of each part, by its name."""
    return lambda: {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1}


def test_complete_deployment_has_no_gap(kafka: str, valkey: str, shop, configure: Configure, lines: Lines) -> None:
    configure(KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__CREATE_TOPICS="true", REDIS__URL=valkey)
    configure(PIPELINE__ARTIFACT=shop.artifact)
    assert main(["doctor"]) == 0
    findings = lines()
    assert "✓" in findings["kafka"]
    assert "functions loaded" in findings["redis"]
    assert re.search(r"version [0-9a-f]{16}, 1[01]\d items, strategies hstu, simple", findings["artifact"])
    assert {"gpu", "starlette", "uvicorn", "matplotlib", "vllm", "onnxruntime", "tensorrt"} <= set(findings)


def test_each_gap_has_a_sentence_and_the_first_sets_the_exit_code(
    valkey: str, configure: Configure, lines: Lines
) -> None:
    configure(KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1", REDIS__URL=valkey, PIPELINE__ARTIFACT="nowhere")
    assert main(["doctor"]) == 4
    findings = lines()
    assert "Kafka at 127.0.0.1:1 does not answer" in findings["kafka"]
    assert "✓" in findings["redis"]
    assert "millrace train LOG" in findings["artifact"]


def test_own_strategies_are_loaded_and_checked(kafka: str, valkey: str, configure: Configure, lines: Lines) -> None:
    configure(KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__CREATE_TOPICS="true", REDIS__URL=valkey)
    module = "tests.pipeline.strategies.test_own_strategies"
    configure(PIPELINE__STRATEGIES=f'["{module}:Alphabetical"]')
    assert main(["doctor"]) == 0
    assert "none configured, strategies alphabetical, simple" in lines()["artifact"]
    configure(PIPELINE__STRATEGIES=f'["{module}:Careless"]')
    assert main(["doctor"]) == 2
    assert "Careless: it " in lines()["artifact"]


def test_missing_topics_are_named(
    kafka: str, valkey: str, topics: Callable[[str], str], configure: Configure, lines: Lines
) -> None:
    name = topics("missing")
    configure(KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__EVENTS_TOPIC=name, REDIS__URL=valkey)
    assert main(["doctor"]) == 4
    assert re.search(f"no topic .*{name}", lines()["kafka"])
    configure(KAFKA__CREATE_TOPICS="true")
    assert main(["doctor"]) == 0
    assert re.search(f"to be created: .*{name}", lines()["kafka"])


def test_unreachable_redis_and_an_evicting_one_are_gaps(
    run: Callable[..., Any], kafka: str, configure: Configure, lines: Lines, tmp_path: Path
) -> None:
    configure(KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__CREATE_TOPICS="true", REDIS__URL="redis://127.0.0.1:1")
    assert main(["doctor"]) == 5
    assert "Redis at 127.0.0.1:1 is unreachable" in lines()["redis"]
    with LocalValkey(tmp_path) as server:
        configure(REDIS__URL=server.url)
        run(enable_eviction(config_file.load(None).redis))
        assert main(["doctor"]) == 5
    assert "maxmemory-policy is allkeys-lru" in lines()["redis"]


async def enable_eviction(redis: RedisConfig) -> None:
    client = RedisClient(redis)
    await client.call("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
    await client.aclose()
