"""Redis hangs, restarts empty, or is full: the stream waits, says so, and loses nothing."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from oracle import Oracle
from redis.asyncio import Redis

from pipeline.data.log_io import BadRecord
from pipeline.records import Event
from worker import config
from worker.clock import VirtualClock
from worker.errors import DeadLetterLimit, StoreUnavailable
from worker.process import build_components, first_error
from worker.replay.file_sink import FileSink
from worker.replay.local_servers import LocalValkey
from worker.replay.log_source import LogSource
from worker.stream.health import HealthState
from worker.stream.loop import Worker

EVENTS, USERS, CAP = 3000, 60, 16


def log() -> list[Event]:
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


def settings(url: str, **more: str) -> config.Config:
    values = {
        "REDIS__URL": url,
        "REDIS__TIMEOUT_S": "0.3",
        "SEQUENCES__MAX_EVENTS": str(CAP),
        "KAFKA__MAX_POLL_RECORDS": "50",
        "EVENTS__MAX_AGE_DAYS": "0",
        "HEALTH__PORT": "0",
    }
    return config.load(None, {f"MILLRACE__{key}": value for key, value in (values | more).items()})


async def stream(
    loaded: config.Config,
    entries: list[Event | BadRecord],
    slates: Path,
    trouble: Callable[[Worker, HealthState], Awaitable[None]] | None = None,
) -> Worker:
    """The whole worker over a log that is its own source; `trouble` goes on beside it."""
    clock = VirtualClock(speed=30.0)  # 150 s of log in 5 s
    async with build_components(loaded, clock) as made, FileSink(slates, made.slates) as sink:
        pulse = HealthState(clock, clock.monotonic())
        worker = made.worker(LogSource(iter(entries), clock, "log", 50), sink, pulse)
        beside = asyncio.create_task(trouble(worker, pulse)) if trouble else None
        try:
            await worker.run()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        finally:
            if beside:
                beside.cancel()
                with suppress(asyncio.CancelledError):
                    await beside
        return worker


def compare(events: list[Event], slates: Path, stored: dict[str, bytes] | None) -> None:
    oracle = Oracle("log", CAP)
    for offset, event in enumerate(events):
        oracle.feed(0, offset, {name: getattr(event, name) for name in Event.__struct_fields__})
    oracle.check_slates([msgspec.json.decode(line) for line in slates.read_bytes().splitlines()])
    if stored is not None:
        assert stored == oracle.rings()


async def rings(url: str) -> dict[str, bytes]:
    async with Redis.from_url(url) as redis:
        keys = [key async for key in redis.scan_iter("seq:*", count=1000)]
        return dict(zip([key.decode() for key in keys], await redis.mget(keys), strict=True))


def test_a_redis_that_hangs_delays_the_stream_and_changes_nothing(server: LocalValkey, tmp_path: Path, run, eventually):
    seen: list[str] = []

    async def hang(worker: Worker, pulse: HealthState) -> None:
        await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
        os.kill(server.pid, signal.SIGSTOP)
        problem = await eventually(lambda: pulse.serving()[1] if pulse.problems else "")
        seen.append(problem)
        os.kill(server.pid, signal.SIGCONT)

    events = log()
    worker = run(stream(settings(server.url), list(events), tmp_path / "slates.jsonl", hang))
    assert worker.tracker.open_count == 0
    assert "did not answer within 0.3 s" in seen[0]
    compare(events, tmp_path / "slates.jsonl", run(rings(server.url)))


def test_a_full_redis_is_waited_out_and_nothing_is_lost(server: LocalValkey, tmp_path: Path, run, eventually):
    seen: list[str] = []

    async def fill(worker: Worker, pulse: HealthState) -> None:
        async with Redis.from_url(server.url) as redis:
            await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
            await redis.config_set("maxmemory", "1mb")
            seen.append(await eventually(lambda: pulse.serving()[1] if pulse.problems else ""))
            await redis.config_set("maxmemory", "0")

    events = log()
    run(stream(settings(server.url), list(events), tmp_path / "slates.jsonl", fill))
    assert "out of memory" in seen[0]
    compare(events, tmp_path / "slates.jsonl", run(rings(server.url)))


def test_a_redis_that_restarts_empty_costs_rings_but_no_answer(server: LocalValkey, tmp_path: Path, run, eventually):
    lost: list[int] = []

    async def restart(worker: Worker, pulse: HealthState) -> None:
        await eventually(lambda: worker.tracker.completed_count > EVENTS // 4)
        server.kill()
        await eventually(lambda: bool(pulse.problems))
        server.start()
        await eventually(lambda: worker.store.rings_lost > 0)
        lost.append(worker.store.rings_lost)

    events = log()
    run(stream(settings(server.url), list(events), tmp_path / "slates.jsonl", restart))
    assert lost
    compare(events, tmp_path / "slates.jsonl", None)


def test_a_redis_that_is_down_at_the_start_is_one_clear_sentence(tmp_path: Path, run):
    with pytest.raises(StoreUnavailable, match=r"^Redis at 127\.0\.0\.1:1 is unreachable[^\n]*$") as caught:
        run(stream(settings("redis://127.0.0.1:1"), [], tmp_path / "slates.jsonl"))
    assert caught.value.exit_code == 5


def test_too_many_bad_records_halt_the_worker_after_they_are_buried(server: LocalValkey, tmp_path: Path, run):
    entries: list[Event | BadRecord] = [*log()[:200], *(BadRecord(n, b"{", "broken") for n in range(50))]
    with pytest.raises(DeadLetterLimit, match="broken") as caught:
        run(stream(settings(server.url, DEAD_LETTERS__MAX_CONSECUTIVE="40"), entries, tmp_path / "slates.jsonl"))
    assert caught.value.exit_code == 6
    assert len((tmp_path / "slates.dead.jsonl").read_bytes().splitlines()) >= 40
