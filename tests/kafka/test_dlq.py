import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kafka.broker import Broker
from worker.cli import main
from worker.config import Config, KafkaConfig
from worker.errors import SinkError
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.kafka.sink import KafkaSink
from worker.operations.dead_letter_topic import DeadLetterRecord, DeadLetterTopic, RequeueProgress


class NoShelf:
    async def put(self, slates) -> None: ...


async def buried(broker: Broker, reasons: list[str], value: bytes = b"v") -> KafkaConfig:
    """A dead-letter topic with a letter for each reason, from partition 1 of an events topic."""
    events, dead, slates = await broker.topic(3), await broker.topic(1, "dead"), await broker.topic(1, "slates")
    kafka = broker.config(events_topic=events, dead_letter_topic=dead, recommendations_topic=slates)
    headers = (("schema", b"event/2"), ("trace", b"abc"))
    letters = [
        DeadLetter(RecordOffset(Partition(events, 1), 1, n), b"k%d" % n, value, headers, 0, reason)
        for n, reason in enumerate(reasons)
    ]
    async with KafkaSink(Config(kafka=kafka), NoShelf()) as sink:
        await sink.send_dead_letters(letters)
    return kafka


def test_letters_are_read_back_with_their_origin(run, broker):
    async def scenario() -> None:
        kafka = await buried(broker, ["one", "two", "three"])
        letters = await DeadLetterTopic(kafka).read(newest=2)
        assert [(letter.reason, letter.key, letter.value) for letter in letters] == [
            ("two", b"k1", b"v"),
            ("three", b"k2", b"v"),
        ]
        assert letters[0].origin == (kafka.events_topic, 1, 1)
        assert letters[0].headers == [("schema", b"event/2"), ("trace", b"abc")]

    run(scenario())


def test_a_requeue_sends_each_record_home_as_it_was_and_only_once(run, broker):
    async def scenario() -> None:
        kafka = await buried(broker, ["a", "b"])
        assert len(await DeadLetterTopic(kafka).requeue()) == 2
        assert await DeadLetterTopic(kafka).requeue() == []
        await broker.produce(kafka.events_topic, [b"end"], partition=1)
        records = await broker.read(kafka.events_topic, 3)
        assert [(each.key, each.value) for each in records] == [(b"k0", b"v"), (b"k1", b"v"), (b"end", b"end")]
        assert {each.partition for each in records} == {1}
        assert records[0].headers == (("schema", b"event/2"), ("trace", b"abc"))

    run(scenario())


def test_a_requeue_by_reason_leaves_the_others_for_later(run, broker):
    async def scenario() -> None:
        kafka = await buried(broker, ["mend", "other", "mend", "other", "mend"])
        sent = [await DeadLetterTopic(kafka).requeue("mend", limit=2), await DeadLetterTopic(kafka).requeue("mend")]
        assert [[letter.offset for letter in each] for each in sent] == [[0, 2], [4]]
        assert [letter.requeued for letter in await DeadLetterTopic(kafka).read()] == [True, False, True, False, True]
        assert [letter.offset for letter in await DeadLetterTopic(kafka).requeue()] == [1, 3]
        assert len(await broker.read(kafka.events_topic, 5)) == 5

    run(scenario())


def test_a_letter_that_was_cut_off_is_never_sent(run, broker):
    async def scenario() -> None:
        kafka = await buried(broker, ["large"], value=b"x" * 1_000_000)
        letters = await DeadLetterTopic(kafka).read()
        assert (letters[0].not_requeueable, await DeadLetterTopic(kafka).requeue()) == (True, [])

    run(scenario())


def test_the_command_lists_and_requeues(run, broker, monkeypatch, capsys):
    kafka = run(buried(broker, ["unknown action 'dance'", "broken"], value=b"\xff{"))
    for key in ("bootstrap_servers", "group_id", "events_topic", "dead_letter_topic", "recommendations_topic"):
        monkeypatch.setenv(f"MILLRACE__KAFKA__{key.upper()}", getattr(kafka, key))
    assert main(["dlq", "ls"]) == 0
    assert f"{kafka.events_topic}-1@0" in (out := capsys.readouterr().out)
    assert "unknown action 'dance'" in out
    assert main(["dlq", "requeue", "--reason", "dance", "--dry-run"]) == 0
    assert "1 letter would be requeued" in capsys.readouterr().out
    assert main(["dlq", "requeue", "--reason", "dance"]) == 0
    assert f"1 letter requeued; position: group {kafka.group_id}.requeue" in capsys.readouterr().out
    assert main(["dlq", "ls", "--json"]) == 0
    letters = [msgspec.json.decode(line, type=DeadLetterRecord) for line in capsys.readouterr().out.splitlines()]
    assert [(letter.value, letter.requeued) for letter in letters] == [(b"\xff{", True), (b"\xff{", False)]


def lying(*offsets: int) -> list[DeadLetterRecord]:
    return [DeadLetterRecord(0, offset, 0, "", ("t", 0, 0), None, None, [], False, False) for offset in offsets]


@given(st.lists(st.sets(st.integers(0, 30)), max_size=5), st.sets(st.integers(0, 30), min_size=1))
def test_what_was_sent_is_remembered_through_the_broker(rounds: list[set[int]], present: set[int]):
    letters, done, sent = lying(*sorted(present)), RequeueProgress(0), set()
    for each in rounds:
        sent |= each & present
        done = RequeueProgress.from_offset(done.extended(each & present, letters).to_offset("group"))
        assert {offset for offset in present if offset in done} == sent


def test_more_holes_than_the_position_can_hold_is_one_sentence():
    offsets = range(100_000, 102_000)
    with pytest.raises(SinkError, match="separate runs"):
        RequeueProgress(0).extended(set(offsets[1::2]), lying(*offsets)).to_offset("group")
