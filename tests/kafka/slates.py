"""Slates, dead letters and a store for tests of the sinks."""

from collections.abc import Sequence
from typing import Any

from pipeline.slates import Covers, Latency, Slate, SlateItem
from tests.kafka.broker import Broker
from worker.config import Config
from worker.errors import StoreUnavailable
from worker.interfaces import DeadLetter, Partition, RecordOffset


class MemoryStore:
    """A SlateWriter that keeps each user's last slate, and fails the first `failures` writes."""

    def __init__(self, failures: int = 0) -> None:
        self.last: dict[str, Slate] = {}
        self._failures = failures

    async def put(self, slates: Sequence[Slate], values: object = None) -> None:
        if self._failures:
            self._failures -= 1
            raise StoreUnavailable("redis is unreachable")
        self.last |= {slate.user_id: slate for slate in slates}


def make_slate(user_id: str, offset: int = 0, items: int = 10) -> Slate:
    ranked = [SlateItem(f"item-{number}", 0.5, 0.1, 0.2, 0.3, "retrieval") for number in range(items)]
    return Slate(
        user_id=user_id,
        items=ranked,
        strategy="hstu",
        backend="torch",
        why="best",
        model_version="v1",
        covers=Covers("events", 0, offset, offset, 1, 5),
        created_ms=1_700_000_000_000,
        latency_ms=Latency(),
    )


def make_dead_letter(
    offset: int, key: bytes | None, value: bytes | None, headers: tuple = (), reason: str = "bad"
) -> DeadLetter:
    return DeadLetter(RecordOffset(Partition("events", 2), 1, offset), key, value, headers, 1_700_000_000_000, reason)


async def sink_config(broker: Broker, partitions: int = 4, **changes: Any) -> Config:
    """Create a sink's topics and return its configuration."""
    topics = {
        "recommendations_topic": await broker.topic(partitions, "slates"),
        "dead_letter_topic": await broker.topic(1, "dead"),
    }
    return Config(kafka=broker.config(**topics | changes))
