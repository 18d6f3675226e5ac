"""Consume slates and skip repetitions: after a restart a worker may answer the same events once more.

usage: python docs/examples/consume_slates.py [BOOTSTRAP_SERVERS] [TOPIC] [COUNT]
"""

import asyncio
import json
import sys

from aiokafka import AIOKafkaConsumer


async def main(bootstrap_servers: str = "localhost:9092", topic: str = "recommendations", count: str = "10") -> None:
    answered: dict[tuple[str, str, int], int] = {}  # (user, topic, partition): the last event that was answered
    left = int(count)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
    async with consumer:
        async for record in consumer:
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
            if not left:
                return


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
