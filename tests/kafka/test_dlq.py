"""Dead letters in a real topic: listed, requeued once, by reason; and the command."""

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from hypothesis import given
from hypothesis import strategies as st

from tests.kafka.broker import Broker
from tests.kafka.slates import MemoryStore, sink_config
from worker.cli import main
from worker.config import KafkaConfig
from worker.errors import SinkError
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.kafka.sink import KafkaSink
from worker.operations.dead_letter_topic import DeadLetterRecord, DeadLetterTopic, RequeueProgress


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
    assert len(await DeadLetterTopic(kafka).requeue()) == 2
    assert await DeadLetterTopic(kafka).requeue() == []
    await broker.produce(kafka.events_topic, [b"end"], partition=1)
    records = await broker.read(kafka.events_topic, 3)
    assert [(record.key, record.value) for record in records] == [(b"k0", b"v"), (b"k1", b"v"), (b"end", b"end")]
    assert {record.partition for record in records} == {1}
    assert records[0].headers == (("schema", b"event/2"), ("trace", b"abc"))


async def test_requeue_by_reason_leaves_the_others_for_later(broker: Broker):
    kafka = await send_dead_letters(broker, ["fixed", "other", "fixed", "other", "fixed"])
    assert [letter.offset for letter in await DeadLetterTopic(kafka).requeue("fixed", limit=2)] == [0, 2]
    assert [letter.offset for letter in await DeadLetterTopic(kafka).requeue("fixed")] == [4]
    assert [letter.requeued for letter in await DeadLetterTopic(kafka).read()] == [True, False, True, False, True]
    assert [letter.offset for letter in await DeadLetterTopic(kafka).requeue()] == [1, 3]
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
    assert [letter.reason for letter in await letters.read()] == ["one"]


async def test_hostile_records_do_not_stop_a_listing(broker: Broker):
    kafka = await send_dead_letters(broker, ["one"])
    topic = kafka.dead_letter_topic
    await broker.append_undecodable(topic, [b"x"], bad=0)
    headers = [("millrace-topic", b"t"), ("millrace-offset", b"9" * 5000), ("millrace-reason", b"\xff")]
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap) as producer:
        await producer.send_and_wait(topic, b"", key=b"k", headers=headers)
    letters = await DeadLetterTopic(kafka).read()
    assert [letter.offset for letter in letters] == [0, 2]
    assert letters[1].origin == ("t", -1, -1)


async def test_truncated_dead_letter_is_never_requeued(broker: Broker):
    kafka = await send_dead_letters(broker, ["large"], value=b"x" * 1_000_000)
    letters = await DeadLetterTopic(kafka).read()
    assert letters[0].not_requeueable
    assert await DeadLetterTopic(kafka).requeue() == []


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


def letters_at(*offsets: int) -> list[DeadLetterRecord]:
    return [DeadLetterRecord(0, offset, 0, "", ("t", 0, 0), None, None, [], False, False) for offset in offsets]


@given(st.lists(st.sets(st.integers(0, 30)), max_size=5), st.sets(st.integers(0, 30), min_size=1))
def test_requeue_progress_survives_its_committed_offset(rounds: list[set[int]], present: set[int]):
    letters = letters_at(*sorted(present))
    progress = RequeueProgress(0)
    sent: set[int] = set()
    for offsets in rounds:
        sent |= offsets & present
        committed = progress.extended(offsets & present, letters).to_offset("group")
        progress = RequeueProgress.from_offset(committed)
        assert {offset for offset in present if offset in progress} == sent


def test_too_many_separate_runs_are_one_error():
    offsets = range(100_000, 102_000)
    with pytest.raises(SinkError, match="separate runs"):
        RequeueProgress(0).extended(set(offsets[1::2]), letters_at(*offsets)).to_offset("group")
