"""How `millrace run` ends: what it commits, how long it takes, what it says last, and its exit code."""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import launch
from tests.faults.topics import view
from tests.kafka.broker import Broker, RecordingListener
from tests.kafka.sources import joined
from tests.pages import read_page
from worker.config import KafkaConfig
from worker.replay.local_servers import LocalKafka, LocalValkey

DRAIN_S = 2.0
END_S = DRAIN_S + 2.0  # within which the process must have ended
Eventually = Callable[..., Awaitable[Any]]


@contextmanager
def worker(log: Path, **settings: object) -> Iterator[subprocess.Popen]:
    process = launch(log, **{"HEALTH__DRAIN_TIMEOUT_S": DRAIN_S, "REDIS__TIMEOUT_S": 0.3, **settings})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """A process that neither answers nor closes its connections while the body runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def stop(process: subprocess.Popen) -> float:
    """Send SIGTERM and return the seconds that the process took to end."""
    start_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(process.wait, 60)
    return time.monotonic() - start_s


def last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1]


@pytest.fixture
def valkey_server(tmp_path: Path) -> Iterator[LocalValkey]:
    with LocalValkey(tmp_path / "valkey") as server:
        yield server


@asynccontextmanager
async def one_open_event(
    server: LocalValkey, deployment: dict[str, str], broker: Broker, log: Path, eventually: Eventually
) -> AsyncIterator[None]:
    """Suspend Redis while an event waits to be pushed; the body runs with Redis still suspended."""
    await eventually(lambda: '"partitions assigned"' in log.read_text())
    with suspended(server.pid):
        await broker.produce(deployment["KAFKA__EVENTS_TOPIC"], [view()])
        await eventually(lambda: '"write failed, retrying"' in log.read_text())
        yield


async def test_each_start_after_a_dead_letter_halt_continues_after_the_letters_that_were_sent(
    deployment: dict[str, str], valkey: str, topics: Callable[[str], str], tmp_path: Path, eventually: Eventually
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    events = await broker.topic()
    group = deployment["KAFKA__GROUP_ID"]
    settings = {**deployment, "KAFKA__EVENTS_TOPIC": events, "REDIS__URL": valkey}
    settings |= {"DEAD_LETTERS__MAX_CONSECUTIVE": 50, "KAFKA__MAX_POLL_RECORDS": 100}
    await broker.produce(events, [b"{"] * 99 + [view()] + [b"{"] * 300 + [view() for _ in range(20)])
    codes = []
    while await broker.committed(events, group) != 420:
        log = tmp_path / f"start-{len(codes)}"
        with worker(log, **settings) as process:

            async def ended_or_done(process: subprocess.Popen = process) -> bool:
                return process.poll() is not None or await broker.committed(events, group) == 420

            await eventually(ended_or_done)
            await stop(process)
        codes.append(process.returncode)
        if process.returncode == 6:
            assert "records in a row were dead letters (dead_letters.max_consecutive is 50)" in last_line(log)
    assert codes[0] == 6
    assert len(await broker.read(deployment["KAFKA__DEAD_LETTER_TOPIC"], 399)) == 399, "each once"
    assert len(await broker.read(deployment["KAFKA__RECOMMENDATIONS_TOPIC"], 1)) >= 1


async def test_sigterm_while_redis_is_silent_ends_in_time_and_names_what_is_left(
    deployment: dict[str, str],
    valkey_server: LocalValkey,
    topics: Callable[[str], str],
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    log = tmp_path / "log"
    with worker(log, **deployment, REDIS__URL=valkey_server.url) as process:
        async with one_open_event(valkey_server, deployment, broker, log, eventually):
            assert await stop(process) < END_S
    assert process.returncode == 9
    assert "stopped with 1 events open; completed but not committed: nothing" in last_line(log)
    assert "drained and committed" not in log.read_text()


@pytest.mark.parametrize("is_open", [True, False], ids=["event open", "all committed"])
async def test_sigterm_while_kafka_is_silent_ends_in_time_with_true_last_words(
    is_open: bool,
    deployment: dict[str, str],
    valkey_server: LocalValkey,
    topics: Callable[[str], str],
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    log = tmp_path / "log"
    with LocalKafka(tmp_path / "kafka") as server:
        settings = {**deployment, "KAFKA__BOOTSTRAP_SERVERS": server.bootstrap, "REDIS__URL": valkey_server.url}
        broker = Broker(server.bootstrap, topics)
        with worker(log, **settings) as process:
            async with one_open_event(valkey_server, settings, broker, log, eventually):
                if is_open:
                    os.kill(server.pid, signal.SIGSTOP)
            if not is_open:
                events, group = settings["KAFKA__EVENTS_TOPIC"], settings["KAFKA__GROUP_ID"]

                async def all_committed() -> bool:
                    return sum([await broker.committed(events, group, each) or 0 for each in range(8)]) == 1

                await eventually(all_committed)
                os.kill(server.pid, signal.SIGSTOP)
            try:
                assert await stop(process) < END_S
            finally:
                os.kill(server.pid, signal.SIGCONT)
    if is_open:
        assert process.returncode == 9
        assert "stopped with 1 events open" in last_line(log)
    else:
        assert process.returncode == 0
        assert "drained and committed" in last_line(log)


def get(log: Path, page: str) -> tuple[int, str]:
    return read_page(json.loads(log.read_text().splitlines()[0])["health_port"], page)


@pytest.mark.parametrize("away", ["Kafka", "Redis"])
async def test_start_that_waits_for_a_server_is_live_and_ends_at_once_on_sigterm(
    away: str, deployment: dict[str, str], valkey: str, tmp_path: Path, eventually: Eventually
) -> None:
    settings = {**deployment, "REDIS__URL": valkey}
    settings |= (
        {"KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"} if away == "Kafka" else {"REDIS__URL": "redis://127.0.0.1:1"}
    )
    log = tmp_path / "log"
    with worker(log, **settings, HEALTH__DRAIN_TIMEOUT_S=20) as process:
        await eventually(lambda: log.read_text().count("is not ready") >= 1)
        ready_s = time.monotonic()
        await eventually(lambda: time.monotonic() - ready_s > 1.5)
        status, text = get(log, "/livez")
        assert status == 200
        assert float(re.findall(r"heartbeat (\S+) s ago", text)[0]) < 1.2
        if away == "Redis":
            assert "redis: Redis at 127.0.0.1:1 is unreachable" in get(log, "/readyz")[1]
        assert await stop(process) < 3
    assert process.returncode == 0
    assert "stopped during the start" in last_line(log)


async def test_worker_outlasts_a_redis_that_is_away_at_the_start_and_later_for_longer_than_a_stall(
    deployment: dict[str, str], topics: Callable[[str], str], tmp_path: Path, eventually: Eventually
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    server = LocalValkey(tmp_path / "valkey")
    log = tmp_path / "log"
    with worker(log, **deployment, REDIS__URL=server.url, HEALTH__STALL_TIMEOUT_S=1) as process:
        await eventually(lambda: '"Redis is not ready"' in log.read_text())
        with server:
            async with one_open_event(server, deployment, broker, log, eventually):
                away_s = time.monotonic()
                await eventually(lambda: time.monotonic() - away_s > 4)
                assert process.poll() is None
                assert "SequenceStore.push: Redis" in get(log, "/readyz")[1]
            assert len(await broker.read(deployment["KAFKA__RECOMMENDATIONS_TOPIC"], 1)) == 1
            assert await stop(process) < END_S
    assert process.returncode == 0


async def test_sigterm_while_the_group_is_joined_ends_at_once(
    deployment: dict[str, str], valkey: str, topics: Callable[[str], str], tmp_path: Path, eventually: Eventually
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    events = await broker.topic()
    release = asyncio.Event()
    busy = RecordingListener(lambda partitions: release.wait())
    config = KafkaConfig(
        bootstrap_servers=broker.bootstrap, group_id=deployment["KAFKA__GROUP_ID"], events_topic=events
    )
    settings = {**deployment, "KAFKA__EVENTS_TOPIC": events, "REDIS__URL": valkey}
    async with joined(config, busy):
        with worker(tmp_path / "log", **settings) as process:
            await eventually(lambda: "revoked" in busy.history)  # the join now waits for that member
            assert await stop(process) < END_S
        release.set()
    assert process.returncode == 0
    assert "stopped during the start" in last_line(tmp_path / "log")


@pytest.mark.parametrize("by", ["watchdog", "SIGTERM"])
async def test_process_whose_pipeline_thread_hangs_ends(
    by: str,
    deployment: dict[str, str],
    valkey: str,
    topics: Callable[[str], str],
    tmp_path: Path,
    eventually: Eventually,
) -> None:
    broker = Broker(deployment["KAFKA__BOOTSTRAP_SERVERS"], topics)
    log = tmp_path / "log"
    os.environ["HANG"] = str(tmp_path / "hang")
    settings = {**deployment, "REDIS__URL": valkey, "PIPELINE__STRATEGIES": '["tests.faults.hanging_strategy:Hanging"]'}
    with worker(log, **settings, HEALTH__STALL_TIMEOUT_S=2 if by == "watchdog" else 300) as process:
        await eventually(lambda: '"partitions assigned"' in log.read_text())
        (tmp_path / "hang").touch()
        await broker.produce(deployment["KAFKA__EVENTS_TOPIC"], [view()])
        if by == "watchdog":
            await eventually(lambda: process.poll() is not None)
        else:
            await eventually(lambda: "millrace_in_flight_events 1.0" in get(log, "/metrics")[1])
            assert await stop(process) < END_S
    text = log.read_text()
    if by == "watchdog":
        assert process.returncode == 7
        assert "no event was completed for 2 s" in text
        assert "hanging_strategy.py" in text, "the stacks"
    else:
        assert process.returncode == 9
        assert "stopped with 1 events open" in text
