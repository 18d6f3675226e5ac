"""Puts a worker together from its configuration, runs it under signals, takes it apart again."""

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
from worker.inference.ranker import Ranker, load_pipeline
from worker.interfaces import Clock, Ranking, Sink, Source
from worker.items.feed import ItemFeed
from worker.items.state import ItemState
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.redis.client import connect
from worker.redis.counters import CounterStore
from worker.redis.sequences import Sequences
from worker.redis.slates import SlateStore
from worker.stream.health import Health, Pulse
from worker.stream.loop import Worker

if TYPE_CHECKING:
    from worker.inference.hot_swap import HotSwap

log = logging.get("process")


@dataclass(slots=True)
class Parts:
    """What a worker runs on, whatever its source and sink are."""

    config: Config
    clock: Clock
    ranker: Ranker
    sequences: Sequences
    slates: SlateStore
    counters: CounterStore
    hot_swap: "HotSwap | None"

    def worker(self, source: Source, sink: Sink, pulse: Pulse, ranker: Ranking | None = None, **options) -> Worker:
        return Worker(self.config, self.clock, source, self.sequences, ranker or self.ranker, sink, pulse, **options)


@asynccontextmanager
async def parts(config: Config, clock: Clock) -> AsyncIterator[Parts]:
    """Redis connected, its functions loaded, the artifact checked, the counters restored."""
    pipeline = load_pipeline(config)
    ranker = Ranker(pipeline, config.pipeline.slate_items, clock, config.pipeline.strategy)
    client = await connect(config.redis)
    try:
        slates = SlateStore(client, config.slates, config.sequences.epoch)
        counters = CounterStore(
            client, config, pipeline.counters, ranker.within, ranker.holding, lambda: pipeline.version
        )
        sequences = Sequences(client, config.sequences)
        yield Parts(config, clock, ranker, sequences, slates, counters, _hot_swap(config, ranker, clock))
    finally:
        ranker.close()
        await client.aclose()


async def consume(config: Config) -> None:
    """`millrace run`: until a signal. Raises the error that ended it."""
    clock = WallClock()
    pulse = Pulse(clock, clock.monotonic())
    health = Health(config.health, pulse)
    log.info("starting", health_port=health.port, artifact=config.pipeline.artifact)
    try:
        async with parts(config, clock) as made, KafkaSink(config, made.slates) as sink:
            worker = made.worker(KafkaSource(config.kafka, clock), sink, pulse)
            _on_signals(worker)
            async with items_known(config, made):
                await supervise(worker, made)
    finally:
        health.close()
    log.info("drained and committed")


@asynccontextmanager
async def items_known(config: Config, made: Parts) -> AsyncIterator[None]:
    """All records of items are known inside, and new ones as they come."""
    folder = config.pipeline.state_dir
    following: asyncio.Task | None = None
    state = ItemState(Path(folder), config.kafka.items_topic, made.ranker, made.clock) if folder else None
    feed = ItemFeed(config.kafka, made.ranker.learn, made.clock, state)
    try:
        await feed.start()
        following = asyncio.create_task(feed.run(), name="items")
        yield
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await feed.stop()
        if state is not None:
            state.close()


async def supervise(worker: Worker, made: Parts) -> None:
    """Runs it and what goes on beside it; what ends the worker is raised as it was, not in a group of groups."""
    beside = [asyncio.create_task(made.counters.run(), name="counters")]
    if made.hot_swap is not None:
        beside.append(asyncio.create_task(made.hot_swap.run(), name="hotswap"))
    try:
        await worker.run()
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


def first_error(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _hot_swap(config: Config, ranker: Ranker, clock: Clock) -> "HotSwap | None":
    if config.pipeline.artifact is None or not config.pipeline.follow_s:
        return None
    from worker.inference.hot_swap import HotSwap  # torch, which only who has a model pays

    return HotSwap(config, ranker, clock)


def _on_signals(worker: Worker) -> None:
    """The first signal drains, the second ends the process where it stands."""

    def again(number: int) -> Callable[[], None]:
        return lambda: os._exit(128 + number)

    def first(number: int) -> None:
        log.info("draining", signal=signal.Signals(number).name)
        worker.stop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, again(each))

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, first, each)
