"""The baseline: the loop that one writes first. One message, one Redis round trip, one inference, one send at a time.

It uses the same parts as the worker (aiokafka, the ring function, the pipeline, the same slate), so that only the way
they are put together differs. Its bias is in its favour: no tracker, no dead letters, no copy of the slate in Redis.

usage: python -m tests.benchmarks.plain_loop [--config FILE]      runs until SIGTERM
"""

import asyncio
import signal
import sys
from contextlib import suppress

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from worker import config
from worker.clock import WallClock
from worker.config import Config
from worker.interfaces import Batch, Entry, Partition, PolledRecords
from worker.process import Components, build_components
from worker.stream.codec import Codec


async def loop(settings: Config) -> None:
    kafka, clock = settings.kafka, WallClock()
    consumer = AIOKafkaConsumer(
        kafka.events_topic,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=kafka.group_id,
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, enable_idempotence=True)
    async with build_components(settings, clock) as made, consumer, producer:
        async for record in consumer:
            await answer(settings, made, record, producer)


async def answer(settings: Config, made: Components, record, producer: AIOKafkaProducer) -> None:
    partition = Partition(record.topic, record.partition)
    fetched = PolledRecords(partition, 1, record.offset + 1, made.clock.now_ms(), made.clock.monotonic(), [record])
    [consumed], _ = Codec(settings, made.clock).decode(fetched)
    await made.sequences.push([consumed])
    await made.ranker.observe([consumed])
    batch = Batch([Entry(consumed.event.user_id, [consumed], 0, 0)], 0, opened_s=made.clock.monotonic())
    [slate] = await made.ranker.rank(batch)
    await producer.send_and_wait(settings.kafka.recommendations_topic, msgspec.json.encode(slate), key=record.key)


def main() -> None:
    settings = config.load(sys.argv[2] if sys.argv[1:2] == ["--config"] else None)

    async def until_signal() -> None:
        running = asyncio.create_task(loop(settings))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(until_signal())


if __name__ == "__main__":
    main()
