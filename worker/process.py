"""Build a worker from its configuration, run it until a signal, and close its components."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from worker import logging
from worker.clock import WallClock
from worker.config import Config
from worker.deadline import Deadline
from worker.executor import SingleThreadExecutor
from worker.fleet import heartbeat
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Clock, OnDelivered, Ranker, Sink, Source
from worker.items.feed import ItemFeed
from worker.items.journal import ItemJournal
from worker.kafka.client import ensure_topics
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.redis.client import connect_at_start
from worker.redis.counters.shared_counters import CounterStore
from worker.redis.ownership import claim_keys
from worker.redis.rings.sequences import SequenceStore
from worker.redis.slates import SlateStore
from worker.stream import drain
from worker.stream.exit_guard import ExitGuard
from worker.stream.health import HealthServer, HealthState
from worker.stream.loop import Worker, ignore_delivery
from worker.stream.signals import handle_signals
from worker.stream.supervisor import Supervisor
from worker.system import gc_tuning

if TYPE_CHECKING:
    from worker.inference.hot_swap import HotSwap

log = logging.get("process")
STOP_S = 10.0  # for one step of the way out, when no deadline is set


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
    deadline: Deadline  # of the way out

    def worker(
        self,
        source: Source,
        sink: Sink,
        health: HealthState,
        ranker: Ranker | None = None,
        on_delivered: OnDelivered = ignore_delivery,
    ) -> Worker:
        """Build the worker. ranker: instead of the pipeline's own."""
        ranker = ranker or self.ranker
        return Worker(
            self.config, self.clock, source, self.sequences, ranker, sink, health, on_delivered, self.deadline
        )


@asynccontextmanager
async def build_components(
    config: Config, clock: Clock, deadline: Deadline | None = None, report: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Components]:
    """Load the artifact, connect to Redis and load its functions; close the ranker and the connection at the end.

    report: called with the reason why Redis is waited for, and with "" when it is there
    """
    deadline = deadline or Deadline(clock)
    loading = SingleThreadExecutor("loading")
    try:
        pipeline = await loading.run(load_pipeline, config)  # for seconds to minutes: the event loop must go on
    finally:
        loading.close(wait=False)
    ranker = PipelineRanker(pipeline, config.pipeline.slate_size, clock, config.pipeline.strategy)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(lambda: ranker.stop(deadline.share_s(STOP_S)))
        client = await connect_at_start(config.redis, config.key_prefix, clock, report)
        stack.push_async_callback(lambda: deadline.finish(client.aclose(), STOP_S))
        slates = SlateStore(client, config.slates, config.sequences.topic_generation)
        counters = CounterStore(
            client, config, pipeline.counters, slates, ranker.run_in_thread, ranker.pin_items, lambda: pipeline.version
        )
        sequences = SequenceStore(client, config.sequences)
        await claim_keys(sequences.claims, client, config)
        hot_swap = _hot_swap(config, ranker, clock)
        if hot_swap is not None:
            stack.callback(hot_swap.close)
        yield Components(config, clock, ranker, sequences, slates, counters, hot_swap, deadline)


class Process:
    """`millrace run`: consumes events until a signal."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._clock = WallClock()
        self._health = HealthState(self._clock, self._clock.monotonic())
        self._deadline = Deadline(self._clock)
        self._worker: Worker | None = None
        self._stopped_start = False
        self.guard = ExitGuard(config.health, self._health, self._deadline)

    async def run(self) -> None:
        """Return when drained and committed, or stopped during the start.

        Raises NotDrained, and the error that ended the worker.
        """
        server = HealthServer(self._config.health, self._health)
        log.info("starting", pid=os.getpid(), health_port=server.port, artifact=self._config.pipeline.artifact)
        beating = [asyncio.create_task(self._health.beat(), name="heartbeat")]
        consuming = asyncio.create_task(self._consume(), name="consume")

        def stop(number: signal.Signals) -> None:
            log.info("draining", signal=number.name)
            self._stop(consuming)

        def stop_orphan() -> None:
            log.warning("draining: the process that supervises this worker is gone")
            self._stop(consuming)

        handle_signals(stop)
        if (fleet := heartbeat.inherited_fd()) is not None:
            beating.append(asyncio.create_task(heartbeat.beat(fleet, server.port, stop_orphan), name="fleet heartbeat"))
        try:
            await consuming
        except asyncio.CancelledError:
            if not self._stopped_start:
                raise
        finally:
            drain.start(self._deadline, self._config.health)
            for task in beating:
                task.cancel()
            server.close()
            # What an aborted producer leaves unread must not be logged after the last words.
            asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        log.info("stopped during the start, nothing was read" if self._stopped_start else "drained and committed")

    async def _consume(self) -> None:
        config = self._config
        clock = self._clock
        deadline = self._deadline
        async with build_components(config, clock, deadline, self._report_redis) as components:
            kafka = config.kafka
            # All at once, so that one error names all that are missing.
            await ensure_topics(kafka, clock, kafka.worker_topics)
            async with KafkaSink(config, components.slates, clock, deadline) as sink:
                source = KafkaSource(kafka, clock, components.sequences.claim_topic, deadline)
                components.sequences.ask_end = source.end_of
                self._worker = components.worker(source, sink, self._health)
                async with follow_items(config, components, self._health):
                    await supervise(self._worker, components)

    def _report_redis(self, reason: str) -> None:
        self._health.problems["redis"] = reason
        if not reason:
            del self._health.problems["redis"]

    def _stop(self, consuming: asyncio.Task) -> None:
        """Drain a worker that has joined its group; end a start where it is, before it joins."""
        if self._worker is not None and self._worker.started:
            self._worker.stop()
        else:
            self._stopped_start = True
            drain.start(self._deadline, self._config.health)
            consuming.cancel()


@asynccontextmanager
async def follow_items(config: Config, components: Components, health: HealthState) -> AsyncIterator[None]:
    """Read the whole items topic before the body runs, and follow it meanwhile."""
    ranker = components.ranker
    clock = components.clock
    folder = config.pipeline.state_dir
    journal = ItemJournal(Path(folder), config.kafka.items_topic, ranker, clock) if folder else None
    feed = ItemFeed(config.kafka, ranker.update_items, clock, journal, deadline=components.deadline)
    try:
        await feed.start()
        following = {"items": feed.run}
        if journal is not None:
            following["items-journal"] = partial(journal.run, lambda: feed.positions)
        async with Supervisor(health, deadline=components.deadline).running(following):
            yield
    finally:
        await feed.stop()
        if journal is not None:
            journal.close()


async def supervise(worker: Worker, components: Components) -> None:
    """Run the worker and its background tasks; raise the error that ended it, outside of its exception groups."""
    gc_tuning.measure()
    gc_tuning.settle()
    background = {"counters": components.counters.run}
    if components.hot_swap is not None:
        background["hotswap"] = components.hot_swap.run
    try:
        async with Supervisor(worker.health, deadline=components.deadline).running(background):
            await worker.run()
    except BaseExceptionGroup as group:
        raise first_error(group) from group


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
