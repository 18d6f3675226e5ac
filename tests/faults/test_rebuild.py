"""Rebuilds that a signal ends."""

import asyncio
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.faults.processes import MILLRACE, environment, run_command
from tests.kafka.broker import Broker
from tests.kafka.rebuilds import Shop, read_rings
from worker.redis.client import RedisClient


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_a_rebuild_with_every_ring_as_it_was_and_leaves_the_group(
    number: signal.Signals,
    kafka: str,
    valkey: str,
    topics: Callable[[str], str],
    client: RedisClient,
    tmp_path: Path,
    eventually,
):
    broker = Broker(kafka, topics)
    shop = await Shop.open(broker, client, max_poll_records=500)
    await shop.leave_gaps(1000)
    before = await read_rings(client, shop.topic)
    settings = {
        "KAFKA__BOOTSTRAP_SERVERS": kafka,
        "KAFKA__GROUP_ID": shop.config.kafka.group_id,
        "KAFKA__EVENTS_TOPIC": shop.topic,
        "REDIS__URL": valkey,
        "REDIS__PREFIX": "",
    }
    log = tmp_path / "log"
    with launch_rebuild(log, {**settings, "KAFKA__MAX_POLL_RECORDS": 1}) as process:
        await eventually(lambda: is_reading(broker, shop))
        process.send_signal(number)
        assert await asyncio.to_thread(process.wait, 30) == 128 + number
    assert f"millrace rebuild: stopped by {number.name} before all rings were restored" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert await read_rings(client, shop.topic) == before
    finished = await asyncio.to_thread(run_command, ["rebuild"], settings)  # no member of the first is in the way
    assert finished.returncode == 0, finished.stderr
    assert "4 rings with gaps rewritten" in finished.stdout


def launch_rebuild(log: Path, settings: Mapping[str, object]) -> subprocess.Popen:
    with log.open("wb") as out:
        return subprocess.Popen([*MILLRACE, "rebuild"], env=environment(settings), stdout=out, stderr=out)


async def is_reading(broker: Broker, shop: Shop) -> bool:
    async with broker.admin() as admin:
        (answer,) = await admin.describe_consumer_groups([shop.config.kafka.group_id])
    (group,) = answer.to_object()["groups"]
    return group["state"] == "Stable" and len(group["members"]) == 1
