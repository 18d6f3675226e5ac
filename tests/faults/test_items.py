"""Items across a SIGKILL of `millrace run`: they come from its state folder and the tail of the items topic."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from tests.faults.processes import launch
from tests.kafka.broker import Broker
from worker.replay.local_servers import LocalValkey

RECORDS = 60


def find_line(log: Path, event: str) -> dict[str, Any] | None:
    """Return the first logged line of an event."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return next((line for line in lines if line["event"] == event), None)


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
