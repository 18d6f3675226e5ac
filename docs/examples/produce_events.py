"""Produce behaviour events, keyed by user: one purchase path of one user.

usage: python docs/examples/produce_events.py [BOOTSTRAP_SERVERS] [TOPIC]
"""

import asyncio
import json
import logging
import sys
import time

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

TIMEOUT_S = 10  # in total; without it an idempotent producer waits for a lost broker for ever
STEPS = [("item-3", "view"), ("item-7", "click"), ("item-7", "cart"), ("item-7", "purchase")]


async def main(bootstrap_servers: str = "localhost:9092", topic: str = "events") -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, enable_idempotence=True)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await producer.start()
            await send_events(producer, topic)
    except (KafkaError, TimeoutError) as error:
        sys.exit(f"cannot write to {topic} at {bootstrap_servers}: {type(error).__name__}; is the broker running?")
    finally:
        await asyncio.wait([asyncio.create_task(producer.stop())], timeout=1)  # it also waits for a lost broker


async def send_events(producer: AIOKafkaProducer, topic: str) -> None:
    headers = [("content-type", b"application/json"), ("schema", b"event/1")]
    for item_id, action in STEPS:
        event = {"user_id": "user-1", "item_id": item_id, "action": action, "ts_ms": time.time_ns() // 1_000_000}
        # The key is the user's id: all events of a user go to one partition, in order.
        key, value = event["user_id"].encode(), json.dumps(event).encode()
        sent = await producer.send_and_wait(topic, value, key=key, headers=headers)
        print(f"{action} {item_id}: {sent.topic}-{sent.partition}@{sent.offset}")


if __name__ == "__main__":
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # main reports the error
    asyncio.run(main(*sys.argv[1:]))
