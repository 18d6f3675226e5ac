from collections.abc import AsyncIterator, Callable

import pytest

from tests.kafka.broker import Broker, RecordingListener
from worker.config import RedisConfig
from worker.redis.client import RedisClient, connect


@pytest.fixture
def broker(kafka: str, topics: Callable[[str], str]) -> Broker:
    """The session's broker."""
    return Broker(kafka, topics)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
async def client(valkey: str) -> AsyncIterator[RedisClient]:
    """A client of the session's Valkey."""
    client = await connect(RedisConfig(url=valkey))
    yield client
    await client.aclose()
