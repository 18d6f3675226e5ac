"""Consume slates and skip repetitions: after a restart a worker may answer the same events once more.

usage: python docs/examples/consume_slates.py [BOOTSTRAP_SERVERS] [TOPIC] [COUNT]
"""

import asyncio
import json
import logging
import sys

from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.errors import KafkaError

TIMEOUT_MS = 10_000  # of a request, after which the broker is lost


async def main(bootstrap_servers: str = "localhost:9092", topic: str = "recommendations", count: str = "10") -> None:
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest", request_timeout_ms=TIMEOUT_MS
    )
    try:
        await consumer.start()
        await print_slates(consumer, int(count))
    except KafkaError as error:
        sys.exit(f"cannot read {topic} at {bootstrap_servers}: {type(error).__name__}; is the broker running?")
    finally:
        await asyncio.wait([asyncio.create_task(consumer.stop())], timeout=1)  # a task: a lost broker cancels it


async def print_slates(consumer: AIOKafkaConsumer, left: int) -> None:
    answered: dict[tuple[str, str, int], int] = {}  # (user, topic, partition): the last event that was answered
    while left > 0:
        for record in await poll(consumer, left):
            slate = json.loads(record.value)
            covers = slate["covers"]  # all of the user's events in this range of offsets are answered by the slate
            source = slate["user_id"], covers["topic"], covers["partition"]
            if covers["last_offset"] <= answered.get(source, -1):
                continue
            answered[source] = covers["last_offset"]
            items = ", ".join(item["item_id"] for item in slate["items"])
            ranked_by = f"{slate['strategy']} on {slate['backend']} ({slate['why']})"
            print(f"{slate['user_id']} by {ranked_by}: {items}")
            left -= 1


async def poll(consumer: AIOKafkaConsumer, max_records: int) -> list[ConsumerRecord]:
    """Return the next records, if there are any within a second. Raises KafkaError when the broker is lost."""
    batches = await consumer.getmany(timeout_ms=1000, max_records=max_records)
    if not batches:
        await consumer.end_offsets(consumer.assignment())  # a read alone waits for a lost broker for ever
    return [record for records in batches.values() for record in records]


if __name__ == "__main__":
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # main reports the error
    asyncio.run(main(*sys.argv[1:]))
