"""Complete workers that tests run in their own process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.clock import WallClock
from worker.config import Config
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.process import Components, build_components, supervise
from worker.stream.health import HealthState
from worker.stream.loop import Worker


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[tuple[Components, Worker]]:
    """A complete worker with its background tasks, as in `millrace run`; drained at the end."""
    clock = WallClock()
    async with build_components(config, clock) as components, KafkaSink(config, components.slates) as sink:
        health = HealthState(clock, clock.monotonic())
        worker = components.worker(KafkaSource(config.kafka, clock), sink, health)
        supervising = asyncio.create_task(supervise(worker, components))
        try:
            yield components, worker
        finally:
            worker.stop()
            await supervising
