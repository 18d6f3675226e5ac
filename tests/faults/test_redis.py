"""Redis hangs, restarts empty, or is full: the stream waits, reports it, and loses nothing."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from oracle import Oracle
from redis.asyncio import Redis

from pipeline.data.log_io import BadRecord
from pipeline.records import Event
from worker import config_file
from worker.clock import VirtualClock
from worker.config import Config
from worker.errors import DeadLetterLimit, StoreUnavailable
from worker.process import build_components, first_error
from worker.redis.rings.sequences import SequenceStore
from worker.replay.file_sink import FileSink
from worker.replay.local_servers import LocalValkey
from worker.replay.log_source import LogSource
from worker.stream.health import HealthState
from worker.stream.loop import Worker

EVENTS = 1000
USERS = 20
RING_EVENTS = 16
PREFIX = "millrace:"  # of the keys of the default group
Fault = Callable[[Worker, HealthState], Coroutine[Any, Any, None]]
Eventually = Callable[..., Awaitable[Any]]


@pytest.fixture
def events() -> list[Event]:
    """A log of 50 s: the users take turns, each fills its ring three times."""
    return [
        Event(
            f"user-{n * 7 % USERS}", f"item-{n * 13 % 97}", ("view", "like", "cart")[n % 3], 1_700_000_000_000 + 50 * n
        )
        for n in range(EVENTS)
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalValkey]:
    with LocalValkey(tmp_path / "valkey") as valkey:
        yield valkey


def settings(url: str, **more: str) -> Config:
    values = {
        "REDIS__URL": url,
        "REDIS__TIMEOUT_S": "0.3",
        "SEQUENCES__MAX_EVENTS": str(RING_EVENTS),
        "KAFKA__MAX_POLL_RECORDS": "50",
        "EVENTS__MAX_AGE_DAYS": "0",
        "HEALTH__PORT": "0",
    }
    return config_file.load(None, {f"MILLRACE__{key}": value for key, value in (values | more).items()})


async def stream(loaded: Config, entries: list[Event | BadRecord], slates: Path, fault: Fault | None = None) -> Worker:
    """Run the worker over a log that is its own source; `fault` runs meanwhile."""
    clock = VirtualClock(speed=30.0)  # 50 s of log in 1.7 s
    async with build_components(loaded, clock) as components, FileSink(slates, components.slates) as sink:
        health = HealthState(clock, clock.monotonic())
        worker = components.worker(LogSource(iter(entries), clock, "log", 50), sink, health)
        fault_task = asyncio.create_task(fault(worker, health)) if fault else None
        try:
            await worker.run()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        finally:
            if fault_task:
                fault_task.cancel()
                with suppress(asyncio.CancelledError):
                    await fault_task
        return worker


def check_slates(events: list[Event], slates: Path) -> Oracle:
    """Check the slates of these events and return the oracle."""
    oracle = Oracle("log", RING_EVENTS)
    for offset, event in enumerate(events):
        oracle.feed(0, offset, {name: getattr(event, name) for name in Event.__struct_fields__})
    oracle.check_slates([msgspec.json.decode(line) for line in slates.read_bytes().splitlines()])
    return oracle


async def read_rings(url: str) -> dict[str, bytes]:
    async with Redis.from_url(url) as redis:
        keys = [key async for key in redis.scan_iter(f"{PREFIX}seq:*", count=1000)]
        return dict(zip([key.decode() for key in keys], await redis.mget(keys), strict=True))


async def test_hanging_redis_delays_the_stream_and_changes_nothing(
    server: LocalValkey, events: list[Event], tmp_path: Path, eventually: Eventually
) -> None:
    problems: list[str] = []

    async def hang(worker: Worker, health: HealthState) -> None:
        await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
        os.kill(server.pid, signal.SIGSTOP)
        problems.append(await eventually(lambda: health.serving()[1] if health.problems else ""))
        os.kill(server.pid, signal.SIGCONT)

    worker = await stream(settings(server.url), list(events), tmp_path / "slates.jsonl", hang)
    assert worker.tracker.open_count == 0
    assert "did not answer within 0.3 s" in problems[0]
    assert await read_rings(server.url) == check_slates(events, tmp_path / "slates.jsonl").rings(PREFIX)


async def test_full_redis_is_waited_for_and_nothing_is_lost(
    server: LocalValkey, events: list[Event], tmp_path: Path, eventually: Eventually
) -> None:
    reported: list[bool] = []

    async def fill(worker: Worker, health: HealthState) -> None:
        async with Redis.from_url(server.url) as redis:
            await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
            await redis.config_set("maxmemory", "1mb")
            reported.append(await eventually(lambda: "out of memory" in health.serving()[1]))
            await redis.config_set("maxmemory", "0")

    await stream(settings(server.url), list(events), tmp_path / "slates.jsonl", fill)
    assert reported
    assert await read_rings(server.url) == check_slates(events, tmp_path / "slates.jsonl").rings(PREFIX)


async def test_redis_restarted_empty_loses_rings_but_no_slate(
    server: LocalValkey, events: list[Event], tmp_path: Path, eventually: Eventually
) -> None:
    rings_lost: list[int] = []

    async def restart(worker: Worker, health: HealthState) -> None:
        store = worker.store
        assert isinstance(store, SequenceStore)
        await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
        server.kill()
        await eventually(lambda: bool(health.problems))
        await asyncio.to_thread(server.start)
        rings_lost.append(await eventually(lambda: store.rings_lost))

    await stream(settings(server.url), list(events), tmp_path / "slates.jsonl", restart)
    assert rings_lost
    check_slates(events, tmp_path / "slates.jsonl")


async def test_unreachable_redis_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"^Redis at 127\.0\.0\.1:1 is unreachable[^\n]*$") as caught:
        await stream(settings("redis://127.0.0.1:1", REDIS__START_TIMEOUT_S="0.1"), [], tmp_path / "slates.jsonl")
    assert caught.value.exit_code == 5


async def test_too_many_bad_records_halt_the_worker_after_they_are_dead_lettered(
    server: LocalValkey, events: list[Event], tmp_path: Path
) -> None:
    entries: list[Event | BadRecord] = [*events[:200], *(BadRecord(n, b"{", "broken") for n in range(50))]
    with pytest.raises(DeadLetterLimit, match="broken") as caught:
        await stream(settings(server.url, DEAD_LETTERS__MAX_CONSECUTIVE="40"), entries, tmp_path / "slates.jsonl")
    assert caught.value.exit_code == 6
    assert len((tmp_path / "slates.dead.jsonl").read_bytes().splitlines()) >= 40
