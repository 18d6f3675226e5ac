"""Redis servers and clients of these tests. The session's Valkey is shared: its tests use user ids of their own."""

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from worker.config import RedisConfig
from worker.redis.client import RedisClient, connect
from worker.replay.local_servers import LocalValkey

_user_numbers = count()


@pytest.fixture
def new_user() -> Callable[[], str]:
    """Return a function that makes user ids no other test has."""
    return lambda: f"user{next(_user_numbers)}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalValkey]:
    """A Valkey of this test alone."""
    with LocalValkey(tmp_path) as server:
        yield server


@pytest.fixture
async def server_client(server: LocalValkey) -> AsyncIterator[RedisClient]:
    """A client of `server`."""
    client = await connect(RedisConfig(url=server.url))
    yield client
    await client.aclose()
