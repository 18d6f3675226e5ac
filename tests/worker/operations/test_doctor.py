"""The doctor tries every part for real, and says what to do about each gap."""

import asyncio
import re
from pathlib import Path

import pytest

from worker import config
from worker.cli import main
from worker.redis.client import RedisClient
from worker.replay.local_servers import LocalValkey


def settings(monkeypatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"MILLRACE__{name}", str(value))


@pytest.fixture
def lines(capsys):
    """The finding of each part, by its name, as the command printed it."""
    return lambda: {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1}


def test_all_is_well(kafka: str, valkey: str, shop, monkeypatch, lines):
    settings(monkeypatch, KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__CREATE_TOPICS="true", REDIS__URL=valkey)
    settings(monkeypatch, PIPELINE__ARTIFACT=shop.artifact)
    assert main(["doctor"]) == 0
    found = lines()
    assert "✓" in found["kafka"]
    assert "functions loaded" in found["redis"]
    assert re.search(r"version [0-9a-f]{16}, 1[01]\d items", found["artifact"])
    assert {"gpu", "starlette", "uvicorn", "matplotlib", "vllm", "onnxruntime", "tensorrt"} <= set(found)


def test_each_gap_has_its_sentence_and_the_first_one_the_exit_code(valkey: str, monkeypatch, lines):
    settings(monkeypatch, KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1", REDIS__URL=valkey, PIPELINE__ARTIFACT="nowhere")
    assert main(["doctor"]) == 4
    found = lines()
    assert "no broker answers at 127.0.0.1:1" in found["kafka"]
    assert "✓" in found["redis"]
    assert "millrace train LOG" in found["artifact"]


def test_missing_topics_are_named(kafka: str, valkey: str, topics, monkeypatch, lines):
    name = topics("missing")
    settings(monkeypatch, KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__EVENTS_TOPIC=name, REDIS__URL=valkey)
    assert main(["doctor"]) == 4
    assert re.search(f"no topic .*{name}", lines()["kafka"])
    settings(monkeypatch, KAFKA__CREATE_TOPICS="true")
    assert main(["doctor"]) == 0
    assert re.search(f"to be created: .*{name}", lines()["kafka"])


def test_redis_is_away_or_would_evict_rings(kafka: str, monkeypatch, lines, tmp_path: Path):
    settings(monkeypatch, KAFKA__BOOTSTRAP_SERVERS=kafka, KAFKA__CREATE_TOPICS="true", REDIS__URL="redis://127.0.0.1:1")
    assert main(["doctor"]) == 5
    assert "Redis at 127.0.0.1:1 is unreachable" in lines()["redis"]
    with LocalValkey(tmp_path) as server:
        settings(monkeypatch, REDIS__URL=server.url)
        evicting(config.load(None).redis)
        assert main(["doctor"]) == 5
    assert "maxmemory-policy is allkeys-lru" in lines()["redis"]


def evicting(redis: config.RedisConfig) -> None:
    async def configure() -> None:
        client = RedisClient(redis)
        await client.call("CONFIG", "SET", "maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
        await client.aclose()

    asyncio.run(configure())
