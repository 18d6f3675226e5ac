"""Items of `millrace run`: after a SIGKILL, and with hostile records in their topic."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from tests.faults.processes import launch, read_lines
from tests.kafka.broker import Broker
from tests.pages import read_metric, read_page
from worker.clock import WallClock
from worker.replay.local_servers import LocalValkey

RECORDS = 60


def find_line(log: Path, event: str) -> dict[str, Any] | None:
    """Return the first logged line of an event."""
    return next((line for line in read_lines(log) if line["event"] == event), None)


async def send(kafka: str, topic: str, records: dict[str, bytes | None]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        for key, value in records.items():
            await producer.send_and_wait(topic, value, key=key.encode())


async def test_killed_worker_restores_its_items_and_reads_only_the_tail_of_the_topic(
    kafka: str,
    topics: Callable[[str], str],
    deployment: dict[str, str],
    eventually: Callable[..., Awaitable[Any]],
    tmp_path: Path,
) -> None:
    items = await Broker(kafka, topics).topic(2, "items")
    await send(kafka, items, {f"i{n}": b'{"item_id": "i%d", "title": "x"}' % n for n in range(RECORDS)})
    first = tmp_path / "first.log"
    second = tmp_path / "second.log"
    with LocalValkey(tmp_path / "valkey") as server:  # the session's has counters of other items
        settings = deployment | {
            "KAFKA__ITEMS_TOPIC": items,
            "REDIS__URL": server.url,
            "PIPELINE__STATE_DIR": str(tmp_path / "state"),
        }
        for log in (first, second):
            worker = launch(log, **settings)
            try:
                await eventually(lambda log=log: find_line(log, "items topic read"))
            finally:
                worker.kill()
                worker.wait(10)
            await send(kafka, items, {"new": b'{"item_id": "new"}', "i3": None})
    assert find_line(first, "items restored") is None
    for log, event, expected in (
        (first, "items topic read", {"records": RECORDS}),
        (second, "items restored", {"items": RECORDS}),
        (second, "items topic read", {"records": 2}),
    ):
        line = find_line(log, event)
        assert line is not None, event
        assert line.items() >= expected.items()


async def test_hostile_item_records_leave_a_running_and_a_starting_worker_serving(
    kafka: str,
    topics: Callable[[str], str],
    deployment: dict[str, str],
    eventually: Callable[..., Awaitable[Any]],
    tmp_path: Path,
) -> None:
    broker = Broker(kafka, topics)
    items = await broker.topic(1, "items")
    nested = b'{"item_id": "x", "extra": ' + b"[" * 1000 + b"]" * 1000 + b"}"

    async def send_hostile(good: str) -> None:
        await send(kafka, items, {"x": nested})
        await broker.append_undecodable(items, [b"x"], bad=0)
        await send(kafka, items, {good: b'{"item_id": "%s"}' % good.encode()})

    with LocalValkey(tmp_path / "valkey") as server:
        settings = deployment | {"KAFKA__ITEMS_TOPIC": items, "REDIS__URL": server.url}
        for number, log in enumerate((tmp_path / "first.log", tmp_path / "second.log")):
            worker = launch(log, **settings)
            try:
                await eventually(lambda log=log: find_line(log, "partitions assigned"))
                starting = find_line(log, "starting")
                assert starting is not None
                port = starting["health_port"]
                if number == 0:
                    assert find_line(log, "skipping invalid item records") is None
                    await send_hostile("a")
                await eventually(lambda port=port: read_metric(port, "millrace_items_total") == 1)
                assert read_metric(port, "millrace_items_invalid_total") == 2
                lines = [line for line in read_lines(log) if line["event"] == "skipping invalid item records"]
                reasons = {line["offset"]: line["error"] for line in lines}
                assert "recursion" in reasons[0]
                assert "utf-8" in reasons[1]
                event = {"user_id": "u", "item_id": "i", "action": "view", "ts_ms": WallClock().now_ms()}
                await send(kafka, deployment["KAFKA__EVENTS_TOPIC"], {"u": json.dumps(event).encode()})
                await broker.read(deployment["KAFKA__RECOMMENDATIONS_TOPIC"], number + 1)
                assert await asyncio.to_thread(read_page, port, "/readyz") == (200, "serving\n")
            finally:
                worker.kill()
                worker.wait(10)
