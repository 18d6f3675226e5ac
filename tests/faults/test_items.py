"""Items across a SIGKILL of `millrace run`: what is known comes from its state folder and the tail of the topic."""

import json
from collections.abc import Callable
from pathlib import Path

from aiokafka import AIOKafkaProducer

from tests.faults.test_run import launched
from tests.kafka.broker import Broker
from worker.replay.local_servers import LocalValkey

RECORDS = 60


def said(log: Path, event: str) -> dict | None:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    return next((line for line in lines if line["event"] == event), None)


async def send(kafka: str, topic: str, *records: tuple[str, bytes | None]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        for key, value in records:
            await producer.send_and_wait(topic, value, key=key.encode())


def test_a_killed_worker_is_ready_again_after_the_tail_of_the_items_topic(
    kafka: str, topics: Callable[[str], str], run, eventually, tmp_path: Path
) -> None:
    names = {f"KAFKA__{kind}_TOPIC": topics(kind.lower()) for kind in ("EVENTS", "RECOMMENDATIONS", "DEAD_LETTER")}
    values: dict[str, object] = names | {
        "KAFKA__BOOTSTRAP_SERVERS": kafka,
        "KAFKA__GROUP_ID": topics("group"),
        "KAFKA__CREATE_TOPICS": "true",
        "PIPELINE__STATE_DIR": tmp_path / "state",
    }

    async def story(server: LocalValkey) -> list[Path]:
        items, logs = await Broker(kafka, topics).topic(2, "items"), [tmp_path / "first.log", tmp_path / "second.log"]
        await send(kafka, items, *((f"i{n}", b'{"item_id": "i%d", "title": "x"}' % n) for n in range(RECORDS)))
        for log in logs:
            worker = launched(values | {"REDIS__URL": server.url, "KAFKA__ITEMS_TOPIC": items}, log)
            try:
                await eventually(lambda log=log: said(log, "items are known"))
            finally:
                worker.kill()
                worker.wait(10)
            await send(kafka, items, ("new", b'{"item_id": "new"}'), ("i3", None))
        return logs

    with LocalValkey(tmp_path / "valkey") as server:
        first, second = run(story(server))
    assert said(first, "items are restored") is None
    for log, event, counted in (
        (first, "items are known", {"records": RECORDS}),
        (second, "items are restored", {"items": RECORDS}),
        (second, "items are known", {"records": 2}),
    ):
        line = said(log, event)
        assert line is not None, event
        assert line.items() >= counted.items()
