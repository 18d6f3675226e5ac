"""What tests share: one real broker, one real Valkey and one trained model a session; names of their own; deadlines.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from worker.cli import main
from worker.replay.local_servers import LocalKafka, LocalValkey, available

T = TypeVar("T")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap address of a broker that the whole session shares; who wants to kill one starts their own."""
    if reason := available():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    with LocalKafka(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.bootstrap


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Valkey that the whole session shares: keep to keys of your own, never flush it."""
    with LocalValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@dataclass(frozen=True)
class Shop:
    """A simulated log and a small model that was trained on its first 80 %."""

    log: Path
    artifact: Path


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Made once, in seconds: what its model answers is arbitrary, but it is a real answer."""
    folder = tmp_path_factory.mktemp("shop")
    simulate = ["simulate", "--out", folder, "--events", 6000, "--users", 300, "--items", 120]
    train = ["train", folder / "events.jsonl", "--out", folder / "artifact", "--epochs", 2, "--width", 16]
    assert main([str(word) for word in simulate]) == 0
    assert main([str(word) for word in train]) == 0
    return Shop(folder / "events.jsonl", folder / "artifact")


@pytest.fixture
def topics(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """`topics("events")` is a topic (or group) name that no other test has, and another one at every call."""
    test, number = re.sub(r"[^A-Za-z0-9_-]", "-", request.node.name)[:160], count()
    return lambda name: f"{name}.{test}.{next(number)}"


@pytest.fixture
def run() -> Callable[..., Any]:
    """`run(coroutine)` in a loop of its own; it fails the test after `timeout_s` instead of hanging."""

    def within(coroutine: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run(asyncio.wait_for(coroutine, timeout_s))

    return within


@pytest.fixture
def eventually() -> Callable[..., Awaitable[Any]]:
    """`await eventually(condition)`: the first true value of a (possibly awaitable) condition, within `timeout_s`."""

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
