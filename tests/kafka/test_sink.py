import asyncio
import os
import signal
from collections.abc import Sequence
from itertools import groupby

import msgspec
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.partitioner import DefaultPartitioner

from pipeline.records import Covers, Latency, Slate, SlateItem
from tests.kafka.broker import Broker
from worker.config import Config
from worker.errors import SinkError, SinkUnavailable, SourceError, StoreUnavailable
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.kafka.sink import KafkaSink
from worker.replay.file_sink import FileSink
from worker.replay.local_servers import LocalKafka


class Shelf:
    """Redis' place: keeps the last slate of each user, and is away as often as it is told."""

    def __init__(self, away: int = 0) -> None:
        self.last: dict[str, Slate] = {}
        self.away = away

    async def put(self, slates: Sequence[Slate]) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("redis is away")
        self.last |= {slate.user_id: slate for slate in slates}


def slate(user_id: str, offset: int = 0, items: int = 10) -> Slate:
    ranked = [SlateItem(f"item-{n}", 0.5, 0.1, 0.2, 0.3, "retrieval") for n in range(items)]
    return Slate(user_id, ranked, "hstu", "v1", Covers("events", 0, offset, offset, 1, 5), 1_700_000_000_000, Latency())


def letter(offset: int, key: bytes | None, value: bytes | None, headers: tuple = (), reason: str = "bad") -> DeadLetter:
    return DeadLetter(RecordOffset(Partition("events", 2), 1, offset), key, value, headers, 1_700_000_000_000, reason)


async def sink_config(broker: Broker, partitions: int = 4, **changes: object) -> Config:
    slates, dead = await broker.topic(partitions, "slates"), await broker.topic(1, "dead")
    return Config(kafka=broker.config(recommendations_topic=slates, dead_letter_topic=dead, **changes))


def test_a_slate_goes_to_its_users_partition_and_to_the_store(run, broker):
    async def scenario() -> None:
        config, shelf = await sink_config(broker), Shelf()
        slates = [slate(f"user-{n}") for n in range(200)]
        async with KafkaSink(config, shelf) as sink:
            await sink.send(slates)
        records = await broker.read(config.kafka.recommendations_topic, 200)
        decoded = {record.key.decode(): msgspec.json.decode(record.value, type=Slate) for record in records}
        assert decoded == shelf.last == {each.user_id: each for each in slates}
        assert {record.headers for record in records} == {
            (("content-type", b"application/json"), ("schema", b"slate/1"))
        }
        parts = list(range(4))
        assert all(record.partition == DefaultPartitioner()(record.key, parts, parts) for record in records)

    run(scenario())


def test_many_batches_of_a_partition_keep_every_users_order(run, broker):
    async def scenario() -> None:
        config = await sink_config(broker, partitions=2)
        async with KafkaSink(config, Shelf()) as sink:
            for start in range(0, 3000, 1000):  # 1.4 MB each: several batches a partition
                await sink.send([slate(f"user-{n % 7}", n) for n in range(start, start + 1000)])
        records = await broker.read(config.kafka.recommendations_topic, 3000)
        assert len(records) == 3000
        for _, group in groupby(sorted(records, key=lambda record: record.key), key=lambda record: record.key):
            offsets = [msgspec.json.decode(record.value, type=Slate).covers.first_offset for record in group]
            assert offsets == sorted(offsets)

    run(scenario())


def test_sending_again_because_redis_was_away_writes_kafka_once(run, broker):
    async def scenario() -> None:
        config, shelf = await sink_config(broker), Shelf(away=2)
        slates = [slate("u1"), slate("u2")]
        async with KafkaSink(config, shelf) as sink:
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await sink.send(slates)
            await sink.send(slates)
            await sink.send([slate("last")])
        records = await broker.read(config.kafka.recommendations_topic, 3)
        assert sorted(record.key for record in records) == [b"last", b"u1", b"u2"]
        assert set(shelf.last) == {"u1", "u2", "last"}

    run(scenario())


def test_a_broker_that_hangs_is_reported_and_then_gets_every_slate_once(run, topics, kafka, tmp_path):
    async def scenario(server: LocalKafka) -> None:
        broker = Broker(server.bootstrap, topics)
        config = await sink_config(broker, request_timeout_ms=1500)
        slates = [slate(f"user-{n}") for n in range(50)]
        async with KafkaSink(config, Shelf()) as sink:
            await send_until_taken(sink, [slate("first")])
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(SinkUnavailable, match="acknowledged nothing"):
                await sink.send(slates)
            os.kill(server.pid, signal.SIGCONT)
            await send_until_taken(sink, slates)
            await asyncio.to_thread(server.kill)
            with pytest.raises(SinkUnavailable):
                await sink.send(slates[:20])
            await asyncio.to_thread(server.start)
            await send_until_taken(sink, more := slates[20:])
            await send_until_taken(sink, [slate("last")])
        records = await broker.read(config.kafka.recommendations_topic, 72 + len(more))
        assert len(records) == 72 + len(more)  # the 20 given up went out, too: nothing is unsent

    with LocalKafka(tmp_path) as server:
        run(scenario(server), timeout_s=90)


async def send_until_taken(sink: KafkaSink, slates: list[Slate]) -> None:
    while True:
        try:
            return await sink.send(slates)
        except SinkUnavailable:
            await asyncio.sleep(0.1)


def test_a_slate_that_is_too_large_is_refused_and_names_its_user(run, broker):
    async def scenario() -> None:
        config = await sink_config(broker)
        async with KafkaSink(config, Shelf()) as sink:
            with pytest.raises(SinkError, match=r"user 'big' has \d+ bytes.*pipeline.slate_size") as caught:
                await sink.send([slate("small"), slate("big", items=20_000)])
            assert not caught.value.retriable
            await sink.send([slate("next")])
        assert [record.key for record in await broker.read(config.kafka.recommendations_topic, 1)] == [b"next"]

    run(scenario())


def test_what_the_topic_refuses_halts_and_leaves_a_producer_that_works(run, broker):
    async def scenario() -> None:
        config = await sink_config(broker)
        small = broker.name("small")
        admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
        await admin.start()
        await admin.create_topics([NewTopic(small, 1, 1, topic_configs={"max.message.bytes": "4000"})])
        await admin.close()
        config = msgspec.structs.replace(
            config, kafka=msgspec.structs.replace(config.kafka, recommendations_topic=small)
        )
        async with KafkaSink(config, Shelf()) as sink:
            with pytest.raises(SinkError, match=r"max.message.bytes"):
                await sink.send([slate("big", items=100)])
            await sink.send([slate("small", items=1)])
            await sink.send([slate("other", items=1)])
        assert [record.key for record in await broker.read(small, 2)] == [b"small", b"other"]

    run(scenario())


def test_a_missing_topic_of_slates_is_named_at_start(run, broker, topics):
    config = Config(kafka=broker.config(recommendations_topic=topics("gone"), dead_letter_topic=topics("gone")))
    with pytest.raises(SourceError, match=r"topic gone.*--create"):
        run(KafkaSink(config, Shelf()).start())


def test_a_dead_letter_keeps_the_record_and_tells_where_it_came_from(run, broker):
    async def scenario() -> None:
        config = await sink_config(broker)
        letters = [
            letter(5, b"k", b"{", (("content-type", b"text/x"), ("millrace-reason", b"old")), "not an event"),
            letter(6, None, None),
            letter(9, b"k", b"later"),
        ]
        async with KafkaSink(config, Shelf()) as sink:
            await sink.send_dead_letters(letters)
        records = await broker.read(config.kafka.dead_letter_topic, 3)
        assert [(record.key, record.value) for record in records] == [(b"k", b"{"), (None, None), (b"k", b"later")]
        assert records[0].headers == (
            ("content-type", b"text/x"),
            ("millrace-reason", b"not an event"),
            ("millrace-topic", b"events"),
            ("millrace-partition", b"2"),
            ("millrace-offset", b"5"),
        )

    run(scenario())


@pytest.mark.parametrize("size", [900_000, 999_000, 1_040_000])
def test_a_bad_record_as_large_as_kafka_takes_is_still_buried(run, broker, size: int):
    async def scenario() -> None:
        config = await sink_config(broker)
        async with KafkaSink(config, Shelf()) as sink:
            await sink.send_dead_letters([letter(5, b"k" * 300, b"x" * size), letter(6, b"k", b"y")])
        first, second = await broker.read(config.kafka.dead_letter_topic, 2)
        whole = dict(first.headers).get("millrace-truncated") is None
        assert first.value == b"x" * (size if whole else 65_536)
        assert whole == (size == 900_000)
        assert second.value == b"y"

    run(scenario())


def test_a_file_sink_writes_a_line_each_and_dead_letters_beside_them(run, tmp_path):
    async def scenario() -> None:
        shelf = Shelf()
        async with FileSink(tmp_path / "out" / "slates.jsonl", shelf) as sink:
            await sink.send([slate("u1"), slate("u2")])
            await sink.send_dead_letters([letter(5, b"k", b"{")])
        lines = (tmp_path / "out" / "slates.jsonl").read_bytes().splitlines()
        assert [msgspec.json.decode(line, type=Slate) for line in lines] == list(shelf.last.values())
        dead = msgspec.json.decode((tmp_path / "out" / "slates.dead.jsonl").read_bytes())
        assert (dead["reason"], dead["record_offset"]) == ("bad", [["events", 2], 1, 5])

    run(scenario())


def test_a_file_that_cannot_be_written_is_one_sentence(run, tmp_path):
    (tmp_path / "file").touch()

    async def scenario() -> None:
        async with FileSink(tmp_path / "file" / "slates.jsonl"):
            pass

    with pytest.raises(SinkError, match="name another file"):
        run(scenario())
