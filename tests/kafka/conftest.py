from collections.abc import Callable

import pytest

from tests.kafka.broker import Broker, RecordingListener


@pytest.fixture
def broker(kafka: str, topics: Callable[[str], str]) -> Broker:
    """The session's broker."""
    return Broker(kafka, topics)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()
