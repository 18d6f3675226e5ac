"""Produce behaviour events, keyed by user: one purchase path of one user.

usage: python docs/examples/produce_events.py [BOOTSTRAP_SERVERS] [TOPIC]
"""

import asyncio
import json
import sys
import time

from aiokafka import AIOKafkaProducer

STEPS = [("item-3", "view"), ("item-7", "click"), ("item-7", "cart"), ("item-7", "purchase")]


async def main(bootstrap_servers: str = "localhost:9092", topic: str = "events") -> None:
    headers = [("content-type", b"application/json"), ("schema", b"event/1")]
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers, enable_idempotence=True) as producer:
        for item_id, action in STEPS:
            event = {"user_id": "user-1", "item_id": item_id, "action": action, "ts_ms": time.time_ns() // 1_000_000}
            # The key is the user's id: all events of a user go to one partition, in order.
            key, value = event["user_id"].encode(), json.dumps(event).encode()
            sent = await producer.send_and_wait(topic, value, key=key, headers=headers)
            print(f"{action} {item_id}: {sent.topic}-{sent.partition}@{sent.offset}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
