"""Each background task of a worker that fails is named, counted and started again, and the worker goes on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from worker.clock import WallClock
from worker.config import Config, HealthConfig, KafkaConfig, PipelineConfig, RedisConfig
from worker.inference.hot_swap import HotSwap
from worker.items.feed import ItemFeed
from worker.items.journal import ItemJournal
from worker.process import Components, build_components, follow_items, supervise
from worker.redis.counters.shared_counters import CounterStore
from worker.stream.health import HealthState
from worker.stream.loop import Worker

Eventually = Callable[..., Awaitable[Any]]


class IdleWorker:
    """A worker without a stream: it runs until it is stopped."""

    def __init__(self) -> None:
        self.health = HealthState(WallClock(), ready=True)
        self.stopped = asyncio.Event()

    async def run(self) -> None:
        await self.stopped.wait()


@pytest.fixture
def config(kafka: str, valkey: str, topics: Callable[[str], str], shop, tmp_path: Path) -> Config:
    return Config(
        kafka=KafkaConfig(bootstrap_servers=kafka, items_topic=topics("items")),
        redis=RedisConfig(url=valkey),
        pipeline=PipelineConfig(
            artifact=str(shop.artifact), threads=1, device="cpu", state_dir=str(tmp_path / "state")
        ),
        health=HealthConfig(port=0),
    )


@asynccontextmanager
async def running(config: Config, components: Components, worker: IdleWorker) -> AsyncIterator[asyncio.Task]:
    async with follow_items(config, components, worker.health):
        supervising = asyncio.create_task(supervise(cast(Worker, worker), components))
        try:
            yield supervising
        finally:
            worker.stopped.set()
            await supervising


@pytest.mark.parametrize(
    ("name", "owner"),
    [("counters", CounterStore), ("hotswap", HotSwap), ("items", ItemFeed), ("items-journal", ItemJournal)],
)
async def test_failed_background_task_is_named_and_started_again_while_the_worker_serves(
    config: Config, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, name: str, owner: type
):
    starts = 0
    run = owner.run

    async def fail_first(self: Any, *arguments: Any) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise ZeroDivisionError("a defect")
        await run(self, *arguments)

    monkeypatch.setattr(owner, "run", fail_first)
    worker = IdleWorker()
    async with (
        build_components(config, WallClock()) as components,
        running(config, components, worker) as supervising,
    ):
        await eventually(lambda: starts == 1)
        assert worker.health.serving() == (False, f"{name}: ZeroDivisionError('a defect')")
        await eventually(lambda: starts == 2)
        assert not supervising.done()
    assert worker.health.problems == {}


async def test_worker_that_ends_ends_its_background_tasks(config: Config, eventually: Eventually):
    worker = IdleWorker()
    async with build_components(config, WallClock()) as components, running(config, components, worker):
        before = {task.get_name() for task in asyncio.all_tasks()}
        assert {"items", "items-journal"} <= before
    assert not {"counters", "hotswap", "items", "items-journal"} & {task.get_name() for task in asyncio.all_tasks()}
