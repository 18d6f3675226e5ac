"""Fixtures of the fault tests."""

from collections.abc import Callable

import pytest


@pytest.fixture
def deployment(kafka: str, topics: Callable[[str], str]) -> dict[str, str]:
    """Settings of a worker whose topics and consumer group no other test has; it creates the topics."""
    return {
        "KAFKA__BOOTSTRAP_SERVERS": kafka,
        "KAFKA__GROUP_ID": topics("group"),
        "KAFKA__CREATE_TOPICS": "true",
        "KAFKA__EVENTS_TOPIC": topics("events"),
        "KAFKA__RECOMMENDATIONS_TOPIC": topics("recommendations"),
        "KAFKA__DEAD_LETTER_TOPIC": topics("dead_letter"),
    }
