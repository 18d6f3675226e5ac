from collections.abc import Callable

import pytest

from tests.kafka.broker import Broker, Owner


@pytest.fixture
def broker(kafka: str, topics: Callable[[str], str]) -> Broker:
    return Broker(kafka, topics)


@pytest.fixture
def owner() -> Owner:
    return Owner()
