"""Build a worker from its configuration, run it until a signal, and close its components."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worker import logging
from worker.clock import WallClock
from worker.config import Config
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Clock, OnDelivered, Ranker, Sink, Source
from worker.items.feed import ItemFeed
from worker.items.journal import ItemJournal
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.redis.client import connect
from worker.redis.counters import CounterStore
from worker.redis.sequences import SequenceStore
from worker.redis.slates import SlateStore
from worker.stream.health import HealthServer, HealthState
from worker.stream.loop import Worker, ignore_delivery

if TYPE_CHECKING:
    from worker.inference.hot_swap import HotSwap

log = logging.get("process")


@dataclass(slots=True)
class Components:
    """The parts that a worker is built from, whatever its source and sink."""

    config: Config
    clock: Clock
    ranker: PipelineRanker
    sequences: SequenceStore
    slates: SlateStore
    counters: CounterStore
    hot_swap: "HotSwap | None"

    def worker(
        self,
        source: Source,
        sink: Sink,
        health: HealthState,
        ranker: Ranker | None = None,
        on_delivered: OnDelivered = ignore_delivery,
    ) -> Worker:
        """Build the worker. ranker: instead of the pipeline's own."""
        return Worker(
            self.config, self.clock, source, self.sequences, ranker or self.ranker, sink, health, on_delivered
        )


@asynccontextmanager
async def build_components(config: Config, clock: Clock) -> AsyncIterator[Components]:
    """Load the artifact, connect to Redis and load its functions; close the ranker and the connection at the end."""
    pipeline = load_pipeline(config)
    ranker = PipelineRanker(pipeline, config.pipeline.slate_size, clock, config.pipeline.strategy)
    client = await connect(config.redis)
    try:
        slates = SlateStore(client, config.slates, config.sequences.topic_generation)
        counters = CounterStore(
            client, config, pipeline.counters, slates, ranker.run_in_thread, ranker.pin_items, lambda: pipeline.version
        )
        sequences = SequenceStore(client, config.sequences)
        yield Components(config, clock, ranker, sequences, slates, counters, _hot_swap(config, ranker, clock))
    finally:
        ranker.close()
        await client.aclose()


async def consume(config: Config) -> None:
    """Consume events until a signal: `millrace run`. Raises the error that ended the worker."""
    clock = WallClock()
    health = HealthState(clock, clock.monotonic())
    server = HealthServer(config.health, health)
    log.info("starting", health_port=server.port, artifact=config.pipeline.artifact)
    try:
        async with build_components(config, clock) as components, KafkaSink(config, components.slates) as sink:
            source = KafkaSource(config.kafka, clock, components.sequences.claim_topic)
            worker = components.worker(source, sink, health)
            _handle_signals(worker)
            async with follow_items(config, components):
                await supervise(worker, components)
    finally:
        server.close()
    log.info("drained and committed")


@asynccontextmanager
async def follow_items(config: Config, components: Components) -> AsyncIterator[None]:
    """Read the whole items topic before the body runs, and follow it meanwhile."""
    ranker = components.ranker
    clock = components.clock
    folder = config.pipeline.state_dir
    following: asyncio.Task | None = None
    journal = ItemJournal(Path(folder), config.kafka.items_topic, ranker, clock) if folder else None
    feed = ItemFeed(config.kafka, ranker.update_items, clock, journal)
    try:
        await feed.start()
        following = asyncio.create_task(feed.run(), name="items")
        yield
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await feed.stop()
        if journal is not None:
            journal.close()


async def supervise(worker: Worker, components: Components) -> None:
    """Run the worker and its background tasks; raise the error that ended it, outside of its exception groups."""
    background = [asyncio.create_task(components.counters.run(), name="counters")]
    if components.hot_swap is not None:
        background.append(asyncio.create_task(components.hot_swap.run(), name="hotswap"))
    try:
        await worker.run()
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)


def first_error(group: BaseExceptionGroup) -> BaseException:
    """Return the first error that is not itself a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _hot_swap(config: Config, ranker: PipelineRanker, clock: Clock) -> "HotSwap | None":
    if config.pipeline.artifact is None or not config.pipeline.artifact_poll_interval_s:
        return None
    from worker.inference.hot_swap import HotSwap  # imports torch, so only when a model is configured

    return HotSwap(config, ranker, clock)


def _handle_signals(worker: Worker) -> None:
    """Let the first signal drain the worker and the second exit at once."""

    def exit_now(number: int) -> Callable[[], None]:
        return lambda: os._exit(128 + number)

    def drain(number: int) -> None:
        log.info("draining", signal=signal.Signals(number).name)
        worker.stop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, exit_now(each))

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, drain, each)
