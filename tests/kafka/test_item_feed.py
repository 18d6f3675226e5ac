"""Item records from a real compacted topic: all of them at the start, new ones as they arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewPartitions, NewTopic
from aiokafka.errors import TopicAuthorizationFailedError

from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item
from pipeline.serving.pipeline import Pipeline
from tests.kafka.broker import Broker
from worker import metrics
from worker.backoff import Backoff
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.inference.ranker import PipelineRanker
from worker.items.feed import ItemFeed
from worker.items.journal import ItemJournal
from worker.stream.health import HealthState
from worker.stream.supervisor import Supervisor

MSGPACK = [("content-type", b"application/msgpack")]
ItemRecord = tuple[str, bytes | None, list[tuple[str, bytes]]]  # key, value, headers


class CatalogueUpdates:
    """Applies a feed's updates to a catalogue, and records the live ones."""

    def __init__(self) -> None:
        self.catalogue = Catalogue(Vocabulary())
        self.updated = asyncio.Event()
        self.live_items: list[str] = []

    async def update(self, items: list[Item], delisted: list[str], live: bool) -> None:
        self.catalogue.upsert(items)
        self.catalogue.delist(delisted)
        self.live_items += [item.item_id for item in items if live]
        self.updated.set()

    def content_size(self, item_id: str) -> int:
        """Return the number of content hashes of the item's record."""
        return sum(map(len, self.catalogue.content_hashes(self.catalogue.vocabulary.token(item_id))))


@pytest.fixture
def updates() -> CatalogueUpdates:
    return CatalogueUpdates()


@pytest.fixture
def count_invalid() -> Callable[[], float]:
    """Return a function that counts the invalid items since the test began."""
    before = metrics.INVALID_ITEMS._value.get()
    return lambda: metrics.INVALID_ITEMS._value.get() - before


@asynccontextmanager
async def following(kafka: KafkaConfig, updates: CatalogueUpdates) -> AsyncIterator[None]:
    """A feed that has read the topic, and follows it meanwhile."""
    feed = ItemFeed(kafka, updates.update, WallClock(), partition_check_s=0.1)
    await feed.start()
    running = asyncio.create_task(feed.run())
    try:
        yield
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await feed.stop()


async def send(kafka: KafkaConfig, *records: ItemRecord) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        for key, value, headers in records:
            await producer.send_and_wait(kafka.items_topic, value, key=key.encode(), headers=headers)


def item_record(item_id: str, **fields: object) -> ItemRecord:
    return item_id, msgspec.json.encode({"item_id": item_id} | fields), []


def tombstone(item_id: str) -> ItemRecord:
    return item_id, None, []


async def test_all_items_are_read_at_the_start_and_later_ones_followed(
    broker: Broker, updates: CatalogueUpdates, count_invalid: Callable[[], float]
):
    kafka = broker.config(items_topic=await broker.topic(3))
    await send(
        kafka,
        item_record("a", title="first"),
        ("b", msgspec.msgpack.encode(Item("b", brand="x", category=["y"])), MSGPACK),
        ("c", b"no item", []),
        item_record("d", tags=["t"]),
        tombstone("d"),
        item_record("e", price=-1),
        item_record("a", title="the second one"),
    )
    async with following(kafka, updates):
        sizes = {item_id: updates.content_size(item_id) for item_id in "abcde"}
        assert [size > 0 for size in sizes.values()] == [True, True, False, False, False]
        assert sizes["a"] > sizes["b"] == 2
        assert count_invalid() == 2
        updates.updated.clear()
        await send(kafka, item_record("new", title="later"))
        await asyncio.wait_for(updates.updated.wait(), 30)
        assert updates.content_size("new") > 0
        assert updates.live_items == ["new"]


async def test_tombstone_delists_an_item_until_its_next_record(
    broker: Broker, updates: CatalogueUpdates, count_invalid: Callable[[], float], eventually
):
    kafka = broker.config(items_topic=await broker.topic(1))
    vocabulary = updates.catalogue.vocabulary
    vocabulary.admit(["old"])
    await send(
        kafka,
        tombstone("old"),
        tombstone("unseen"),
        item_record("back", title="x"),
        tombstone("back"),
        item_record("back", title="y"),
        tombstone(""),
    )
    async with following(kafka, updates):
        vocabulary.admit(["unseen"])  # by an event that arrives after the tombstone
        tokens = [vocabulary.token(item_id) for item_id in ("old", "unseen", "back")]
        assert vocabulary.blocked[tokens].tolist() == [True, True, False]
        assert count_invalid() == 1
        await send(kafka, item_record("unseen", title="again"), tombstone("back"))
        await eventually(lambda: vocabulary.blocked[vocabulary.token("back")])
        assert not vocabulary.blocked[vocabulary.token("unseen")]


async def restart(kafka: KafkaConfig, state_dir: Path) -> tuple[Vocabulary, list[str]]:
    """Start a worker's item feed, then stop it. Return its vocabulary, and the items that it read from the topic."""
    clock = WallClock()
    ranker = PipelineRanker(Pipeline.load(None), 10, clock)
    read: list[str] = []

    async def update(items: list[Item], delisted: list[str], live: bool) -> None:
        read.extend([*(item.item_id for item in items), *delisted])
        await ranker.update_items(items, delisted, live)

    journal = ItemJournal(state_dir, kafka.items_topic, ranker, clock)
    feed = ItemFeed(kafka, update, clock, journal)
    await feed.start()
    await feed.stop()
    journal.close()
    ranker.close()
    return ranker.pipeline.vocabulary, read


async def test_restart_reads_only_records_after_the_last_save(broker: Broker, tmp_path: Path):
    kafka = broker.config(items_topic=await broker.topic(2))
    records = [item_record(f"i{number}", title=f"thing {number}") for number in range(20)]
    await send(kafka, *records, tombstone("i3"))
    first, read = await restart(kafka, tmp_path)
    assert set(read) == {f"i{number}" for number in range(20)}
    await send(kafka, item_record("new", title="later"), tombstone("i4"))
    second, read = await restart(kafka, tmp_path)
    assert sorted(read) == ["i4", "new"]
    assert second.item_ids == [*first.item_ids, "new"]
    assert sorted(second.delisted_since(0)) == ["i3", "i4"]
    _, read = await restart(kafka, tmp_path)
    assert read == []


HOSTILE = {
    "infinite price": ("x", msgspec.msgpack.encode({"item_id": "x", "price": float("inf")}), MSGPACK),
    "nested brackets": ("x", b'{"item_id": "x", "extra": ' + b"[" * 1000 + b"]" * 1000 + b"}", []),
    "nested brackets in MessagePack": ("x", b"\x82\xa7item_id\xa1x\xa5extra" + b"\x91" * 2000 + b"\x90", MSGPACK),
    "unknown content type": ("x", b"{}", [("content-type", b"text/html")]),
    "tombstone of no item": ("", None, []),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
async def test_hostile_record_is_skipped_and_named_at_the_start_and_while_following(
    broker: Broker,
    updates: CatalogueUpdates,
    count_invalid: Callable[[], float],
    eventually,
    logged,
    record: ItemRecord,
):
    kafka = broker.config(items_topic=await broker.topic(1))
    await send(kafka, item_record("a", title="t"), record, item_record("b", title="t"))
    async with following(kafka, updates):
        assert [updates.content_size(item_id) > 0 for item_id in "ab"] == [True, True]
        assert count_invalid() == 1
        [line] = [line for line in logged() if "invalid" in line["event"]]
        assert (line["partition"], line["offset"]) == (0, 1)
        assert line["error"]
        await send(kafka, record, item_record("c", title="t"))
        await eventually(lambda: updates.content_size("c"))
        assert count_invalid() == 2


async def test_record_that_cannot_be_decoded_costs_the_rest_of_its_batch(
    broker: Broker, updates: CatalogueUpdates, count_invalid: Callable[[], float], eventually, logged
):
    def values(*item_ids: str) -> list[bytes]:
        return [item_record(item_id, title="t")[1] or b"" for item_id in item_ids]

    kafka = broker.config(items_topic=await broker.topic(1))
    await broker.append_undecodable(kafka.items_topic, values("a", "bad", "lost"), bad=1)
    await send(kafka, item_record("b", title="t"))
    async with following(kafka, updates):
        assert [updates.content_size(item_id) > 0 for item_id in ("a", "bad", "lost", "b")] == [
            True,
            False,
            False,
            True,
        ]
        assert count_invalid() == 2
        [line] = [line for line in logged() if "invalid" in line["event"]]
        assert (line["offset"], line["records"]) == (1, 2)
        await broker.append_undecodable(kafka.items_topic, values("c", "worse"), bad=1)
        await send(kafka, item_record("d", title="t"))
        await eventually(lambda: updates.content_size("d"))
        assert updates.content_size("c") > 0
        assert count_invalid() == 3


async def test_new_partitions_are_read_from_their_beginning_and_old_ones_go_on(
    broker: Broker, updates: CatalogueUpdates, eventually
):
    kafka = broker.config(items_topic=await broker.topic(1))
    await send(kafka, item_record("a", title="t"))
    async with following(kafka, updates):
        async with broker.admin() as admin:
            await admin.create_partitions({kafka.items_topic: NewPartitions(3)})
        await produce_to(kafka, 2, item_record("b", title="t"))
        await produce_to(kafka, 1, tombstone("a"))
        vocabulary = updates.catalogue.vocabulary
        await eventually(lambda: updates.content_size("b") and vocabulary.blocked[vocabulary.token("a")])
        await produce_to(kafka, 0, item_record("c", title="t"))
        await eventually(lambda: updates.content_size("c"))
        assert updates.live_items == ["b", "c"], "nothing is read twice"


async def test_topic_that_is_created_after_the_start_is_followed(broker: Broker, updates: CatalogueUpdates, eventually):
    kafka = broker.config(items_topic=broker.name("late"))
    async with following(kafka, updates):
        assert not updates.updated.is_set()
        async with broker.admin() as admin:
            await admin.create_topics([NewTopic(kafka.items_topic, 2, 1)])
        await send(kafka, item_record("a", title="t"))
        await eventually(lambda: updates.content_size("a"))


async def test_feed_that_failed_continues_where_it_ended(
    broker: Broker, updates: CatalogueUpdates, monkeypatch: pytest.MonkeyPatch
):
    """The failure is between the poll and the update: the poll has moved the consumer's position."""
    kafka = broker.config(items_topic=await broker.topic(1))
    feed = ItemFeed(kafka, updates.update, WallClock())
    await feed.start()
    await send(kafka, item_record("a", title="t"))

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(feed._updater, "apply", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            await feed.run()
    running = asyncio.create_task(feed.run())
    await asyncio.wait_for(updates.updated.wait(), 30)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await feed.stop()
    assert updates.content_size("a") > 0


async def produce_to(kafka: KafkaConfig, partition: int, record: ItemRecord) -> None:
    key, value, headers = record
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        await producer.send_and_wait(kafka.items_topic, value, key=key.encode(), partition=partition, headers=headers)


async def test_lasting_refusal_is_reported_again_and_again_and_the_feed_goes_on_after_it(
    broker: Broker, updates: CatalogueUpdates, monkeypatch: pytest.MonkeyPatch, eventually, logged
):
    """The broker of the tests refuses nobody, so the client raises what it raises for a topic without permission."""
    kafka = broker.config(items_topic=await broker.topic(1))
    feed = ItemFeed(kafka, updates.update, WallClock())
    await feed.start()
    assert feed._consumer is not None
    health = HealthState(WallClock(), ready=True)

    async def refuse(*_: object, **__: object) -> None:
        raise TopicAuthorizationFailedError(kafka.items_topic)

    def reports() -> list[str]:
        lines.extend(line["error"] for line in logged() if line["event"] == "background task failed")
        return lines

    lines: list[str] = []
    async with Supervisor(health, Backoff(0.01, 0.01), stable_s=0.2).running({"items": feed.run}):
        with monkeypatch.context() as patched:
            patched.setattr(feed._consumer, "getmany", refuse)
            await eventually(lambda: len(reports()) >= 3)
            ready, text = health.serving()
            assert not ready
            assert "TopicAuthorizationFailed" in text
        await send(kafka, item_record("a", title="t"))
        await eventually(lambda: updates.content_size("a") and health.serving()[0])
    assert all(kafka.items_topic in line for line in lines)
    await feed.stop()
