"""Commands that read topics while their broker goes silent: they end in time, with the error that says so."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from aiokafka.admin import RecordsToDelete

from tests.kafka.broker import BreakableKafka, Broker
from tests.kafka.rebuilds import Shop
from worker.clock import WallClock
from worker.config import Config
from worker.errors import SourceUnavailable
from worker.interfaces import ConsumedEvent
from worker.operations.dead_letter_topic import DeadLetterTopic
from worker.operations.rebuild import Rebuild, RebuildPlan
from worker.redis.client import RedisClient


@pytest.fixture
def silent_kafka(tmp_path: Path) -> Iterator[BreakableKafka]:
    with BreakableKafka(tmp_path / "kafka") as server:
        yield server
        server.resume()


@pytest.fixture
async def shop(silent_kafka: BreakableKafka, topics: Callable[[str], str], client: RedisClient) -> Shop:
    """Large events on one partition, more than a few fetches return."""
    broker = Broker(silent_kafka.bootstrap, topics)
    topic = await broker.topic(1)
    shop = Shop(broker, Config(kafka=broker.config(events_topic=topic, request_timeout_ms=3000)), client)
    await broker.produce(topic, [shop.value(0, number) + b" " * 2000 for number in range(2000)])
    return shop


async def rebuild(rebuilding: type[Rebuild], shop: Shop) -> None:
    await rebuilding(shop.config, shop.client, WallClock()).run(False, lambda offsets, total: None)


async def test_silent_broker_ends_a_rebuild_with_the_error_of_the_read(silent_kafka: BreakableKafka, shop: Shop):
    class RebuildBeforeSilence(Rebuild):
        async def _read(self, *args) -> AsyncIterator[tuple[list[ConsumedEvent], int]]:
            async for item in super()._read(*args):
                silent_kafka.suspend()
                yield item

    with pytest.raises(SourceUnavailable, match="stopped answering"):
        await rebuild(RebuildBeforeSilence, shop)


async def test_silent_broker_ends_a_rebuild_that_counts_deleted_records(silent_kafka: BreakableKafka, shop: Shop):
    class RebuildBeforeSilence(Rebuild):
        async def _plan(self, *args) -> RebuildPlan:
            plan = await super()._plan(*args)
            async with shop.broker.admin() as admin:
                await admin.delete_records(dict.fromkeys(plan.ranges, RecordsToDelete(5)))
            return plan

        async def _count_deleted(self, *args) -> int:
            silent_kafka.suspend()
            return await super()._count_deleted(*args)

    with pytest.raises(SourceUnavailable):
        await rebuild(RebuildBeforeSilence, shop)


@pytest.fixture
async def letters(silent_kafka: BreakableKafka, topics: Callable[[str], str]) -> DeadLetterTopic:
    broker = Broker(silent_kafka.bootstrap, topics)
    topic = await broker.topic(1)
    await broker.produce(topic, [b" " * 2000] * 2000)
    return DeadLetterTopic(broker.config(dead_letter_topic=topic, request_timeout_ms=3000))


async def test_silent_broker_ends_a_read_of_dead_letters_with_the_error_of_the_read(
    silent_kafka: BreakableKafka, letters: DeadLetterTopic
):
    async def read() -> None:
        async for _ in letters.letters({}, lambda _, offsets: offsets):
            silent_kafka.suspend()

    with pytest.raises(SourceUnavailable, match="stopped answering"):
        await read()
