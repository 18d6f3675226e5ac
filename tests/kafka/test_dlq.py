"""Dead letters in a real topic: listed, requeued once, by reason; and the command."""

import tracemalloc

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from hypothesis import given
from hypothesis import strategies as st

from tests.kafka.broker import Broker
from tests.kafka.slates import MemoryStore, sink_config
from worker.cli import main
from worker.config import Config, KafkaConfig
from worker.errors import SinkError
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.kafka.sink import KafkaSink
from worker.operations import requeue as requeue_module
from worker.operations.dead_letter_topic import DeadLetterRecord, DeadLetterTopic
from worker.operations.requeue import Requeue
from worker.operations.requeue_progress import ProgressWalk, RequeueProgress


async def send_dead_letters(broker: Broker, reasons: list[str], value: bytes = b"v") -> KafkaConfig:
    """Fill a dead-letter topic with one dead letter per reason, from partition 1 of an events topic."""
    events = await broker.topic(3)
    config = await sink_config(broker, partitions=1, events_topic=events)
    headers = (("schema", b"event/2"), ("trace", b"abc"))
    letters = [
        DeadLetter(RecordOffset(Partition(events, 1), 1, number), b"k%d" % number, value, headers, 0, reason)
        for number, reason in enumerate(reasons)
    ]
    async with KafkaSink(config, MemoryStore()) as sink:
        await sink.send_dead_letters(letters)
    return config.kafka


async def requeue(kafka: KafkaConfig, reason: str = "", limit: int | None = None) -> list[DeadLetterRecord]:
    """Requeue and return the letters that were sent."""
    return [letter async for chunk in Requeue(DeadLetterTopic(kafka), reason, limit).run() for letter in chunk]


async def test_dead_letters_are_read_back_with_their_origin(broker: Broker):
    kafka = await send_dead_letters(broker, ["one", "two", "three"])
    letters = await DeadLetterTopic(kafka).read(newest=2)
    assert [(letter.reason, letter.key, letter.value) for letter in letters] == [
        ("two", b"k1", b"v"),
        ("three", b"k2", b"v"),
    ]
    assert letters[0].origin == (kafka.events_topic, 1, 1)
    assert letters[0].headers == [("schema", b"event/2"), ("trace", b"abc")]


async def test_requeue_sends_each_original_record_once(broker: Broker):
    kafka = await send_dead_letters(broker, ["a", "b"])
    assert len(await requeue(kafka)) == 2
    assert await requeue(kafka) == []
    await broker.produce(kafka.events_topic, [b"end"], partition=1)
    records = await broker.read(kafka.events_topic, 3)
    assert [(record.key, record.value) for record in records] == [(b"k0", b"v"), (b"k1", b"v"), (b"end", b"end")]
    assert {record.partition for record in records} == {1}
    assert records[0].headers == (("schema", b"event/2"), ("trace", b"abc"))


async def test_requeue_by_reason_leaves_the_others_for_later(broker: Broker):
    kafka = await send_dead_letters(broker, ["fixed", "other", "fixed", "other", "fixed"])
    assert [letter.offset for letter in await requeue(kafka, "fixed", limit=2)] == [0, 2]
    assert [letter.offset for letter in await requeue(kafka, "fixed")] == [4]
    assert [letter.requeued for letter in await DeadLetterTopic(kafka).read(newest=100)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert [letter.offset for letter in await requeue(kafka)] == [1, 3]
    assert len(await broker.read(kafka.events_topic, 5)) == 5


async def test_aborted_records_at_the_end_do_not_block_a_listing(broker: Broker):
    kafka = await send_dead_letters(broker, ["one"])
    topic = kafka.dead_letter_topic
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=broker.name("writer")) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"never", partition=0)
        await producer.abort_transaction()
    letters = DeadLetterTopic(broker.config(dead_letter_topic=topic, request_timeout_ms=5000))
    assert await letters.read(newest=1) == [], "the newest offset is the marker's"
    assert [letter.reason for letter in await letters.read(newest=100)] == ["one"]


async def test_hostile_records_do_not_stop_a_listing(broker: Broker):
    kafka = await send_dead_letters(broker, ["one"])
    topic = kafka.dead_letter_topic
    await broker.append_undecodable(topic, [b"x"], bad=0)
    headers = [("millrace-topic", b"t"), ("millrace-offset", b"9" * 5000), ("millrace-reason", b"\xff")]
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap) as producer:
        await producer.send_and_wait(topic, b"", key=b"k", headers=headers)
    letters = await DeadLetterTopic(kafka).read(newest=10)
    assert [letter.offset for letter in letters] == [0, 2]
    assert letters[1].origin == ("t", -1, -1)


async def test_truncated_dead_letter_is_never_requeued(broker: Broker):
    kafka = await send_dead_letters(broker, ["large"], value=b"x" * 1_000_000)
    letters = await DeadLetterTopic(kafka).read(newest=100)
    assert letters[0].not_requeueable
    assert await requeue(kafka) == []


def test_dlq_command_lists_and_requeues(run, broker: Broker, monkeypatch, capsys):
    kafka = run(send_dead_letters(broker, ["unknown action 'dance'", "broken"], value=b"\xff{"))
    for key in ("bootstrap_servers", "group_id", "events_topic", "dead_letter_topic", "recommendations_topic"):
        monkeypatch.setenv(f"MILLRACE__KAFKA__{key.upper()}", getattr(kafka, key))
    assert main(["dlq", "ls"]) == 0
    listing = capsys.readouterr().out
    assert f"{kafka.events_topic}-1@0" in listing
    assert "unknown action 'dance'" in listing
    assert main(["dlq", "requeue", "--reason", "dance", "--dry-run"]) == 0
    assert "1 dead letter would be requeued" in capsys.readouterr().out
    assert main(["dlq", "requeue", "--reason", "dance"]) == 0
    assert f"1 dead letter requeued; position: group {kafka.group_id}.requeue" in capsys.readouterr().out
    assert main(["dlq", "ls", "--json"]) == 0
    letters = [msgspec.json.decode(line, type=DeadLetterRecord) for line in capsys.readouterr().out.splitlines()]
    assert [(letter.value, letter.requeued) for letter in letters] == [(b"\xff{", True), (b"\xff{", False)]


def letter_of(kafka: KafkaConfig, offset: int, value: bytes = b"v", topic: str = "") -> DeadLetter:
    origin = RecordOffset(Partition(topic or kafka.events_topic, 1), 1, offset)
    return DeadLetter(origin, b"k%d" % offset, value, (), 0, "broken")


async def send(kafka: KafkaConfig, *letters: DeadLetter) -> None:
    async with KafkaSink(Config(kafka=kafka), MemoryStore()) as sink:
        for letter in letters:
            await sink.send_dead_letters([letter])


async def test_copies_of_a_dead_letter_go_home_once_also_those_that_come_later(broker: Broker):
    kafka = await send_dead_letters(broker, [])
    first, second = letter_of(kafka, 0), letter_of(kafka, 1)
    await send(kafka, first, second, first, first)
    assert [letter.offset for letter in await requeue(kafka)] == [0, 1]
    await send(kafka, second, letter_of(kafka, 2), first, letter_of(kafka, 1, b"of a topic that was re-created"))
    assert [letter.value for letter in await requeue(kafka)] == [b"v", b"of a topic that was re-created"]
    assert await requeue(kafka) == []
    assert all(letter.requeued for letter in await DeadLetterTopic(kafka).read(newest=100)), "copies are handled, too"
    assert len(await broker.read(kafka.events_topic, 4)) == 4


async def test_letter_whose_topic_is_gone_stays_and_keeps_no_other(broker: Broker):
    kafka = msgspec.structs.replace(await send_dead_letters(broker, []), create_topics=True)
    gone = broker.name("gone")
    await send(kafka, letter_of(kafka, 0), letter_of(kafka, 1, topic=gone), letter_of(kafka, 2))
    run = Requeue(DeadLetterTopic(kafka))
    assert [[letter.offset for letter in chunk] async for chunk in run.run()] == [[0, 2]]
    assert run.missing == {gone: 1}
    async with broker.admin() as admin:
        assert gone not in await admin.list_topics()
        await admin.create_topics([NewTopic(gone, 2, 1)])
    assert [letter.offset for letter in await requeue(kafka)] == [1]


async def test_requeue_is_sent_in_transactions_of_bounded_bytes(broker: Broker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requeue_module, "CHUNK_BYTES", 2 << 20)
    kafka = await send_dead_letters(broker, [])
    await send(kafka, *(letter_of(kafka, number, b"x" * 900_000) for number in range(7)))
    chunks = [len(chunk) async for chunk in Requeue(DeadLetterTopic(kafka)).run()]
    assert [count for count in chunks if count] == [3, 3, 1]
    assert len(await broker.read(kafka.events_topic, 7)) == 7


async def test_dry_run_holds_a_few_letters_in_memory_not_the_topic(broker: Broker):
    kafka = await send_dead_letters(broker, [])
    await send(kafka, *(letter_of(kafka, number, b"x" * 900_000) for number in range(40)))
    tracemalloc.start()
    try:
        count = 0
        async for _ in Requeue(DeadLetterTopic(kafka)).select():
            count += 1
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 40
    assert peak_bytes < 15 << 20


@given(st.lists(st.sets(st.integers(0, 30)), max_size=5), st.sets(st.integers(0, 30), min_size=1), st.integers(0, 31))
def test_requeue_progress_survives_its_committed_offset(rounds: list[set[int]], present: set[int], stop: int):
    """Each round passes the letters from the committed offset on, some of them up to `stop` only."""
    progress = RequeueProgress()
    sent: set[int] = set()
    for number, offsets in enumerate(rounds):
        walk = ProgressWalk(progress)
        for offset in sorted(each for each in present if each >= progress.offset and (number % 2 or each < stop)):
            if offset in offsets:
                sent.add(offset)
            walk.add(offset, offset in sent)
        progress = RequeueProgress.from_offset(walk.progress().to_offset("group"))
        assert {offset for offset in present if offset in progress} == sent


def test_too_many_separate_runs_are_one_error():
    walk = ProgressWalk(RequeueProgress(100_000))
    for offset in range(100_000, 102_000):
        walk.add(offset, offset % 2 == 1)
    with pytest.raises(SinkError, match="separate runs"):
        walk.progress().to_offset("group")
