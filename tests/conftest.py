"""What tests share: one real broker and one real Valkey a session, names of their own, and awaiting with a deadline."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from itertools import count
from typing import Any, TypeVar

import pytest

from worker.local import LocalKafka, LocalValkey, available

T = TypeVar("T")


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
