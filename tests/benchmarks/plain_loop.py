"""The baseline of the stream's benchmark: a loop that handles one message at a time.

Each message costs one Redis round trip, one inference and one send. The loop uses the worker's own parts (aiokafka, the
ring function, the pipeline, the same slate), so that only their arrangement differs. The comparison favours the loop:
it has no offset tracking, no dead letters and no copy of the slate in Redis.

usage: python -m tests.benchmarks.plain_loop [--config FILE]      runs until SIGTERM
"""

import argparse
import asyncio
import signal
from contextlib import suppress

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord

from worker import config_file
from worker.clock import WallClock
from worker.config import Config
from worker.interfaces import Batch, Entry, Partition, PolledRecords
from worker.process import Components, build_components
from worker.stream.codec import Codec


async def loop(settings: Config) -> None:
    kafka = settings.kafka
    consumer = AIOKafkaConsumer(
        kafka.events_topic,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=kafka.group_id,
        auto_offset_reset="earliest",
    )
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, enable_idempotence=True)
    async with build_components(settings, WallClock()) as components, consumer, producer:
        async for record in consumer:
            await answer(settings, components, record, producer)


async def answer(settings: Config, components: Components, record: ConsumerRecord, producer: AIOKafkaProducer) -> None:
    clock = components.clock
    partition = Partition(record.topic, record.partition)
    polled = PolledRecords(partition, 1, record.offset + 1, clock.now_ms(), clock.monotonic(), [record])
    [consumed], _ = Codec(settings, clock).decode(polled)
    await components.sequences.push([consumed])
    await components.ranker.observe([consumed])
    batch = Batch([Entry(consumed.event.user_id, [consumed], 0, 0)], 0, opened_s=clock.monotonic())
    [slate] = await components.ranker.rank(batch)
    await producer.send_and_wait(settings.kafka.recommendations_topic, msgspec.json.encode(slate), key=record.key)


async def until_sigterm(settings: Config) -> None:
    running = asyncio.create_task(loop(settings))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="TOML file; MILLRACE__SECTION__KEY variables override it")
    args = parser.parse_args()
    asyncio.run(until_sigterm(config_file.load(args.config)))


if __name__ == "__main__":
    main()
