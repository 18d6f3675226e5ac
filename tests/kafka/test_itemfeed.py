"""Records of items from a real compacted topic: whole at the start, then as they come."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord

from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item
from pipeline.serving.pipeline import Pipeline
from tests.kafka.broker import Broker
from worker import metrics
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.inference.ranker import PipelineRanker
from worker.items.feed import ItemFeed
from worker.items.journal import ItemJournal

MSGPACK = [("content-type", b"application/msgpack")]


class Known:
    """A catalogue that tells when it has learnt; items by their category, None without a record."""

    def __init__(self) -> None:
        self.catalogue, self.learnt = Catalogue(Vocabulary()), asyncio.Event()
        self.news: list[str] = []  # what came after the start

    async def learn(self, items: list[Item], withdrawn: list[str], news: bool) -> None:
        self.catalogue.upsert(items)
        self.catalogue.delist(withdrawn)
        self.news += [item.item_id for item in items if news]
        self.learnt.set()

    def words(self, item_id: str) -> int:
        """How many hashes its record left."""
        return sum(map(len, self.catalogue.content_hashes(self.catalogue.vocabulary.token(item_id))))


async def send(kafka: KafkaConfig, *records: tuple[str, bytes | None, list]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        for key, value, headers in records:
            await producer.send_and_wait(kafka.items_topic, value, key=key.encode(), headers=headers)


def json_of(item_id: str, **fields: object) -> tuple[str, bytes, list]:
    return item_id, msgspec.json.encode({"item_id": item_id} | fields), []


def test_the_whole_topic_is_known_at_the_start_and_what_comes_later_soon_after(run, broker: Broker) -> None:
    async def scenario() -> None:
        kafka, known = broker.config(items_topic=await broker.topic(3)), Known()
        packed = msgspec.msgpack.encode(Item("b", brand="x", category=["y"]))
        before = metrics.INVALID_ITEMS._value.get()
        await send(
            kafka, json_of("a", title="first"), ("b", packed, MSGPACK), ("c", b"no item", []),
            json_of("d", tags=["t"]), ("d", None, []), json_of("e", price=-1), json_of("a", title="the second one"),
        )  # fmt: skip
        feed = ItemFeed(kafka, known.learn, WallClock())
        await feed.start()
        following = asyncio.create_task(feed.run())
        try:
            assert [known.words(item_id) > 0 for item_id in "abcde"] == [True, True, False, False, False]
            assert known.words("a") > known.words("b") == 2
            assert metrics.INVALID_ITEMS._value.get() - before == 2
            known.learnt.clear()
            await send(kafka, json_of("new", title="later"))
            await asyncio.wait_for(known.learnt.wait(), 10)
            assert known.words("new") > 0
            assert known.news == ["new"]
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await feed.stop()

    run(scenario())


def test_a_tombstone_withdraws_an_item_until_a_record_brings_it_back(run, eventually, broker: Broker) -> None:
    async def scenario() -> None:
        kafka, known = broker.config(items_topic=await broker.topic(1)), Known()
        vocabulary = known.catalogue.vocabulary
        vocabulary.admit(["old"])
        await send(kafka, ("old", None, []), ("unseen", None, []), json_of("back", title="x"), ("back", None, []),
                   json_of("back", title="y"), ("", None, []))  # fmt: skip
        before = metrics.INVALID_ITEMS._value.get()
        feed = ItemFeed(kafka, known.learn, WallClock())
        await feed.start()
        following = asyncio.create_task(feed.run())
        try:
            vocabulary.admit(["unseen"])  # by an event that comes late
            barred = vocabulary.blocked[[vocabulary.token(item_id) for item_id in ("old", "unseen", "back")]]
            assert barred.tolist() == [True, True, False]
            assert metrics.INVALID_ITEMS._value.get() - before == 1
            await send(kafka, json_of("unseen", title="again"), ("back", None, []))
            await eventually(lambda: vocabulary.blocked[vocabulary.token("back")])
            assert not vocabulary.blocked[vocabulary.token("unseen")]
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await feed.stop()

    run(scenario())


def test_a_restart_reads_what_has_come_since_the_last_save_alone(run, broker: Broker, tmp_path: Path) -> None:
    async def scenario() -> None:
        kafka, clock = broker.config(items_topic=await broker.topic(2)), WallClock()
        await send(kafka, *(json_of(f"i{number}", title=f"thing {number}") for number in range(20)), ("i3", None, []))

        async def start() -> tuple[Vocabulary, list[str]]:
            """Of a worker that has just become ready, and the items that it has read from the topic."""
            ranker, read = PipelineRanker(Pipeline.load(None), 10, clock), []

            async def learn(items: list[Item], withdrawn: list[str], news: bool) -> None:
                read.extend([*(item.item_id for item in items), *withdrawn])
                await ranker.update_items(items, withdrawn, news)

            state = ItemJournal(tmp_path, kafka.items_topic, ranker, clock)
            feed = ItemFeed(kafka, learn, clock, state)
            await feed.start()
            await feed.stop()
            state.close()
            ranker.close()
            return ranker.pipeline.vocabulary, read

        first, read = await start()
        assert set(read) == {f"i{number}" for number in range(20)}
        await send(kafka, json_of("new", title="later"), ("i4", None, []))
        again, tail = await start()
        assert sorted(tail) == ["i4", "new"]
        assert again.item_ids == [*first.item_ids, "new"]
        assert sorted(again.delisted_since(0)) == ["i3", "i4"]
        _, nothing = await start()
        assert nothing == []

    run(scenario())


def test_a_cluster_without_the_topic_is_served_by_ids_alone(run, broker: Broker) -> None:
    async def scenario() -> None:
        known = Known()
        feed = ItemFeed(broker.config(items_topic="never-made"), known.learn, WallClock())
        await feed.start()
        await feed.run()
        await feed.stop()
        assert not known.learnt.is_set()

    run(scenario())


def test_a_header_without_a_value_is_a_strange_item_and_no_error() -> None:
    async def learn(*_: object) -> None:
        pytest.fail("nothing is known of it")

    feed = ItemFeed(KafkaConfig(), learn, WallClock())
    record = ConsumerRecord("items", 0, 7, 0, 0, b"a", b'{"item_id": "a"}', 0, 1, 16, [("content-type", None)])
    before = metrics.INVALID_ITEMS._value.get()
    assert list(feed._changes([record])) == []
    assert metrics.INVALID_ITEMS._value.get() - before == 1
