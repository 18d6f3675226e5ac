"""`millrace run --workers`: real members on a real broker, one of them killed; and starts that are refused."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.processes import launch, read_lines, run_command
from tests.faults.topics import view
from tests.kafka.broker import Broker
from tests.pages import read_page

Eventually = Callable[..., Awaitable[Any]]


def assigned_members(log: Path) -> set[str]:
    """Return the numbers of the members that have partitions, by their latest assignment."""
    latest = {line["worker"]: line["partitions"] for line in read_lines(log) if line["event"] == "partitions assigned"}
    return {worker for worker, partitions in latest.items() if partitions}


async def test_fleet_answers_everything_although_a_member_is_killed(
    kafka: str,
    topics: Callable[[str], str],
    deployment: dict[str, str],
    valkey: str,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    broker = Broker(kafka, topics)
    log = tmp_path / "fleet.log"
    settings = deployment | {"REDIS__URL": valkey, "KAFKA__PARTITIONS": 4, "KAFKA__SESSION_TIMEOUT_MS": 6000}
    fleet = launch(log, "--workers", "2", **settings)
    try:
        await eventually(lambda: assigned_members(log) == {"0", "1"}, timeout_s=60)
        (starting,) = (line for line in read_lines(log) if line["event"] == "starting workers")
        port = starting["health_port"]
        await eventually(lambda: read_page(port, "/readyz") == (200, "serving, workers: 2\n"))
        topic, slates = deployment["KAFKA__EVENTS_TOPIC"], deployment["KAFKA__RECOMMENDATIONS_TOPIC"]
        await broker.produce(topic, [view(f"a{number}") for number in range(50)], partition=None)
        await broker.read(slates, 50)
        pids = [line["pid"] for line in read_lines(log) if line["event"] == "starting" and "worker" in line]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        await broker.produce(topic, [view(f"b{number}") for number in range(50)], partition=None)
        records = await broker.read(slates, 100)
        users = {json.loads(record.value)["user_id"] for record in records}
        assert users == {f"{letter}{number}" for letter in "ab" for number in range(50)}
        await eventually(lambda: read_page(port, "/readyz")[0] == 200, timeout_s=60)
        page = await asyncio.to_thread(read_page, port, "/metrics")
        assert page[0] == 200
        assert "millrace_fleet_restarts 1.0" in page[1]
        for number in range(2):
            assert f'millrace_events_total{{worker="{number}"}}' in page[1]
        fleet.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(fleet.wait, 60) == 0, log.read_text()[-2000:]
    finally:
        fleet.kill()


async def test_members_drain_when_their_fleet_is_killed(
    deployment: dict[str, str], valkey: str, eventually: Eventually, tmp_path: Path
) -> None:
    log = tmp_path / "fleet.log"
    fleet = launch(log, "--workers", "1", **deployment, REDIS__URL=valkey, KAFKA__PARTITIONS=1)
    try:
        await eventually(lambda: assigned_members(log) == {"0"}, timeout_s=60)
    finally:
        fleet.kill()
    await eventually(lambda: any(line["event"] == "drained and committed" for line in read_lines(log)))
    words = "draining: the process that supervises this worker is gone"
    assert any(line["event"] == words for line in read_lines(log))


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        ("0", "argument --workers: '0': want a whole number from 1 on, or auto"),
        ("many", "argument --workers: 'many': want a whole number from 1 on, or auto"),
        ("3", "--workers 3: topic {topic} has 2 partitions, and a worker without one has nothing to do"),
    ],
)
async def test_number_of_workers_that_cannot_be_is_refused(
    deployment: dict[str, str], valkey: str, workers: str, sentence: str
) -> None:
    settings = deployment | {"REDIS__URL": valkey, "KAFKA__PARTITIONS": 2}
    ended = await asyncio.to_thread(run_command, ["run", "--workers", workers], settings)
    assert ended.returncode == 2
    assert sentence.format(topic=deployment["KAFKA__EVENTS_TOPIC"]) in ended.stderr


async def test_member_that_cannot_start_ends_the_fleet_with_its_exit_code(
    deployment: dict[str, str], valkey: str, tmp_path: Path
) -> None:
    settings = deployment | {"REDIS__URL": valkey, "PIPELINE__ARTIFACT": tmp_path / "nowhere"}
    ended = await asyncio.to_thread(run_command, ["run", "--workers", "2"], settings)
    assert ended.returncode == 3
    assert "nowhere" in ended.stderr
    assert "worker 0 ended with exit code 3" in ended.stderr
