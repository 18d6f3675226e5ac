"""Fixtures of the whole suite: one real broker, one real Valkey and one trained model per session.

Coroutine tests run under asyncio (anyio's plugin, auto mode); `timeout` in pyproject.toml bounds every test. Without a
GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
"""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings

from worker.cli import main
from worker.config import LogConfig, RedisConfig
from worker.logging import configure
from worker.redis.client import RedisClient, connect
from worker.replay.local_servers import LocalKafka, LocalValkey, missing_requirement

T = TypeVar("T")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# On the tests' small tensors more threads take up to eight times the CPU, most of it waiting for one another.
torch.set_num_threads(1)
# The time that an example takes depends on what else the machine does, so it is never a reason to fail.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap address of a broker shared by the session; a test that kills a broker starts its own."""
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    with LocalKafka(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.bootstrap


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Valkey shared by the session: use keys of your own, never flush it."""
    with LocalValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@dataclass(frozen=True)
class Shop:
    """A simulated log and a small model trained on its first 80 %."""

    log: Path
    artifact: Path


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Simulate and train once, in seconds; the model's answers are arbitrary but real."""
    folder = tmp_path_factory.mktemp("shop")
    simulate = ["simulate", "--out", folder, "--events", 6000, "--users", 300, "--items", 120]
    train = ["train", folder / "events.jsonl", "--out", folder / "artifact", "--epochs", 2, "--width", 16]
    assert main([str(word) for word in simulate]) == 0
    assert main([str(word) for word in train]) == 0
    return Shop(folder / "events.jsonl", folder / "artifact")


@pytest.fixture
async def client(valkey: str) -> AsyncIterator[RedisClient]:
    """A client of the session's Valkey."""
    client = await connect(RedisConfig(url=valkey))
    yield client
    await client.aclose()


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that makes topic (or group) names no other test has, a new one per call."""
    test = re.sub(r"[^A-Za-z0-9_-]", "-", request.node.name)[:160]
    number = count()
    return lambda name: f"{name}.{test}.{next(number)}"


@pytest.fixture
def run() -> Callable[..., Any]:
    """Return `run(coroutine)`: runs it in a new loop and fails after `timeout_s`. For tests that are not coroutines."""

    def within(coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run(asyncio.wait_for(coroutine, timeout_s))

    return within


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """Return `logged()`: the lines logged since the last call, as dicts. For logs of the test's body."""
    configure(LogConfig())
    logging.getLogger().handlers.clear()  # its stderr is closed after the set-up; pytest adds its own handler

    def take() -> list[dict[str, Any]]:
        lines = [record.msg for record in caplog.records]
        caplog.clear()
        return lines  # pyright: ignore[reportReturnType] - structlog passes its dict as the message

    return take


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    """Return `eventually(condition)`: waits for the first true value of a (possibly awaitable) condition."""

    async def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
        async with asyncio.timeout(timeout_s):
            while True:
                value = condition()
                if isinstance(value, Awaitable):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.02)

    return until
