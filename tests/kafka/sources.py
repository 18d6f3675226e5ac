"""Kafka sources that tests join and poll."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.interfaces import PolledRecords, RebalanceListener
from worker.kafka.source import KafkaSource


@asynccontextmanager
async def joined(config: KafkaConfig, listener: RebalanceListener) -> AsyncIterator[KafkaSource]:
    """A source that has joined its group; it leaves at the end."""
    source = KafkaSource(config, WallClock())
    await source.start(listener)
    try:
        yield source
    finally:
        await source.stop()


async def poll_records(source: KafkaSource, count: int) -> list[PolledRecords]:
    """Poll until `count` records have arrived; the test's timeout ends it otherwise."""
    polled: list[PolledRecords] = []
    while sum(len(part.records) for part in polled) < count:
        polled += await source.poll(0.2)
    return polled


def values(polled: list[PolledRecords]) -> list[bytes]:
    return [record.value or b"" for part in polled for record in part.records]
