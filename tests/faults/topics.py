"""Topics of the fault tests, seen from outside the workers."""

from collections.abc import Mapping
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from pipeline.records import Event
from tests.oracle import ACTIONS
from worker.clock import WallClock


async def read_to_end(bootstrap: str, begins: Mapping[TopicPartition, int]) -> list[ConsumerRecord]:
    """Return the committed records of partitions from these offsets on, by partition in offset order."""
    # Offsets are sought, not `seek_to_beginning`: the consumer's own reset to the latest may still be pending then, and
    # would win.
    async with AIOKafkaConsumer(
        bootstrap_servers=bootstrap, isolation_level="read_committed", auto_offset_reset="earliest"
    ) as consumer:
        consumer.assign(list(begins))
        ends = await consumer.end_offsets(list(begins))
        for partition, begin in begins.items():
            consumer.seek(partition, begin)
        records: list[ConsumerRecord] = []
        while any([await consumer.position(partition) < ends[partition] for partition in begins]):
            for polled in (await consumer.getmany(timeout_ms=200)).values():
                records += polled
    return sorted(records, key=lambda record: (record.partition, record.offset))


def view(user: str = "u") -> bytes:
    """Return an event of this moment."""
    return msgspec.json.encode(Event(user, "i", "view", WallClock().now_ms()))


def decode(value: bytes | None) -> dict[str, Any] | None:
    """Return the event in a record, or None for an invalid record."""
    try:
        event = msgspec.json.decode(value or b"")
    except msgspec.DecodeError:
        return None
    return event if isinstance(event, dict) and event.get("action") in ACTIONS else None


def origin(record: ConsumerRecord) -> tuple[int, int]:
    """Return the partition and the offset from which a dead letter came."""
    headers = dict(record.headers)
    return int(headers["millrace-partition"]), int(headers["millrace-offset"])
