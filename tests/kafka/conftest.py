from collections.abc import Callable, Iterator

import pytest

from tests.kafka.broker import BreakableKafka, Broker, RecordingListener
from worker.replay.local_servers import missing_requirement


@pytest.fixture
def broker(kafka: str, topics: Callable[[str], str]) -> Broker:
    """The session's broker."""
    return Broker(kafka, topics)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture(scope="session")
def second_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableKafka]:
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    with BreakableKafka(tmp_path_factory.mktemp("breakable-kafka")) as server:
        yield server


@pytest.fixture
def breakable_kafka(second_kafka: BreakableKafka) -> Iterator[BreakableKafka]:
    """A broker apart from the session's, running at the start of each test."""
    yield second_kafka
    second_kafka.restore()


@pytest.fixture
def breakable_broker(breakable_kafka: BreakableKafka, topics: Callable[[str], str]) -> Broker:
    return Broker(breakable_kafka.bootstrap, topics)
