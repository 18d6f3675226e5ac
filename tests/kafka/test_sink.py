"""KafkaSink on a real broker, and the file sink of replays."""

from itertools import groupby

import msgspec
import pytest
from aiokafka.partitioner import DefaultPartitioner

from pipeline.slates import Slate
from tests.kafka.broker import Broker
from tests.kafka.slates import MemoryStore, make_dead_letter, make_slate, sink_config
from worker.config import Config
from worker.errors import SinkError, SourceError, StoreUnavailable
from worker.kafka.sink import KafkaSink
from worker.replay.file_sink import FileSink


async def test_slate_is_written_to_its_users_partition_and_to_the_store(broker: Broker):
    config = await sink_config(broker)
    store = MemoryStore()
    slates = [make_slate(f"user-{number}") for number in range(200)]
    async with KafkaSink(config, store) as sink:
        await sink.send(slates)
    records = await broker.read(config.kafka.recommendations_topic, 200)
    decoded = {record.key.decode(): msgspec.json.decode(record.value, type=Slate) for record in records}
    assert decoded == store.last == {slate.user_id: slate for slate in slates}
    assert {record.headers for record in records} == {(("content-type", b"application/json"), ("schema", b"slate/1"))}
    partitions = list(range(4))
    assert all(record.partition == DefaultPartitioner()(record.key, partitions, partitions) for record in records)


async def test_each_users_order_is_kept_over_many_batches_of_a_partition(broker: Broker):
    config = await sink_config(broker, partitions=2)
    async with KafkaSink(config, MemoryStore()) as sink:
        for start in range(0, 3000, 1000):  # 1.4 MB each: several batches per partition
            await sink.send([make_slate(f"user-{number % 7}", number) for number in range(start, start + 1000)])
    records = await broker.read(config.kafka.recommendations_topic, 3000)
    assert len(records) == 3000
    for _, group in groupby(sorted(records, key=lambda record: record.key), key=lambda record: record.key):
        offsets = [msgspec.json.decode(record.value, type=Slate).covers.first_offset for record in group]
        assert offsets == sorted(offsets)


async def test_repeated_send_after_a_redis_outage_writes_to_kafka_once(broker: Broker):
    config = await sink_config(broker)
    store = MemoryStore(failures=2)
    slates = [make_slate("u1"), make_slate("u2")]
    async with KafkaSink(config, store) as sink:
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await sink.send(slates)
        await sink.send(slates)
        await sink.send([make_slate("last")])
    records = await broker.read(config.kafka.recommendations_topic, 3)
    assert sorted(record.key for record in records) == [b"last", b"u1", b"u2"]
    assert set(store.last) == {"u1", "u2", "last"}


async def test_too_large_slate_is_rejected_with_its_user(broker: Broker):
    config = await sink_config(broker)
    async with KafkaSink(config, MemoryStore()) as sink:
        with pytest.raises(SinkError, match=r"user 'big' has \d+ bytes.*pipeline.slate_size") as caught:
            await sink.send([make_slate("small"), make_slate("big", items=20_000)])
        assert not caught.value.retriable
        await sink.send([make_slate("next")])
    assert [record.key for record in await broker.read(config.kafka.recommendations_topic, 1)] == [b"next"]


async def test_record_rejected_by_the_topic_leaves_a_working_producer(broker: Broker):
    topic = await broker.topic(kind="small", settings={"max.message.bytes": "4000"})
    async with KafkaSink(await sink_config(broker, recommendations_topic=topic), MemoryStore()) as sink:
        with pytest.raises(SinkError, match=r"max.message.bytes"):
            await sink.send([make_slate("big", items=100)])
        await sink.send([make_slate("small", items=1)])
        await sink.send([make_slate("other", items=1)])
    assert [record.key for record in await broker.read(topic, 2)] == [b"small", b"other"]


async def test_missing_recommendations_topic_is_named_at_start(broker: Broker):
    missing = {"recommendations_topic": broker.name("gone"), "dead_letter_topic": broker.name("gone")}
    with pytest.raises(SourceError, match=r"topic gone.*--create"):
        await KafkaSink(Config(kafka=broker.config(**missing)), MemoryStore()).start()


async def test_dead_letter_keeps_the_record_and_names_its_origin(broker: Broker):
    config = await sink_config(broker)
    headers = (("content-type", b"text/x"), ("millrace-reason", b"old"))
    letters = [
        make_dead_letter(5, b"k", b"{", headers, reason="not an event"),
        make_dead_letter(6, None, None),
        make_dead_letter(9, b"k", b"later"),
    ]
    async with KafkaSink(config, MemoryStore()) as sink:
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


@pytest.mark.parametrize("size", [900_000, 999_000, 1_040_000])
async def test_dead_letter_of_the_largest_record_is_truncated_to_fit(broker: Broker, size: int):
    config = await sink_config(broker)
    async with KafkaSink(config, MemoryStore()) as sink:
        await sink.send_dead_letters([make_dead_letter(5, b"k" * 300, b"x" * size), make_dead_letter(6, b"k", b"y")])
    first, second = await broker.read(config.kafka.dead_letter_topic, 2)
    is_complete = dict(first.headers).get("millrace-truncated") is None
    assert first.value == b"x" * (size if is_complete else 65_536)
    assert is_complete == (size == 900_000)
    assert second.value == b"y"


async def test_file_sink_writes_one_line_per_slate_and_dead_letters_to_their_own_file(tmp_path):
    store = MemoryStore()
    async with FileSink(tmp_path / "out" / "slates.jsonl", store) as sink:
        await sink.send([make_slate("u1"), make_slate("u2")])
        await sink.send_dead_letters([make_dead_letter(5, b"k", b"{")])
    lines = (tmp_path / "out" / "slates.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=Slate) for line in lines] == list(store.last.values())
    dead = msgspec.json.decode((tmp_path / "out" / "slates.dead.jsonl").read_bytes())
    assert (dead["reason"], dead["record_offset"]) == ("bad", [["events", 2], 1, 5])


async def test_unwritable_file_sink_asks_for_another_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="name another file"):
        async with FileSink(tmp_path / "file" / "slates.jsonl"):
            pass
