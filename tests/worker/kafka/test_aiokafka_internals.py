"""Private parts of aiokafka that worker/kafka relies on: an upgrade that changes them fails here, without a broker."""

import ast
import dataclasses
import inspect
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.memory_records import MemoryRecords

from tests.kafka.broker import RecordingListener, record_batch
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.interfaces import Partition
from worker.kafka import consumer_group
from worker.kafka.consumer_group import GroupMember
from worker.kafka.corrupt_record import DECODE_ERRORS, CorruptRecord
from worker.kafka.records import FetchedRecord, use_fast_records

FOLDER = Path(consumer_group.__file__).parent
TP = TopicPartition("events", 0)


@pytest.fixture
async def member() -> AsyncIterator[GroupMember]:
    """A member that is assigned one partition and never connects."""
    member = GroupMember(KafkaConfig(), RecordingListener(), WallClock())
    member.consumer.subscribe([TP.topic])
    member.consumer._subscription.assign_from_subscribed({TP})
    yield member
    await member.consumer.stop()


def partition_records(batches: bytes) -> PartitionRecords:
    return PartitionRecords(
        tp=TP,
        records=MemoryRecords(batches),
        aborted_transactions=[],
        fetch_offset=0,
        key_deserializer=None,
        value_deserializer=None,
        check_crcs=False,
        isolation_level=READ_COMMITTED,
    )


@pytest.fixture
async def parts(member: GroupMember) -> AsyncIterator[list[tuple[object, str]]]:
    """Every private part of aiokafka that the worker uses, as (owner, name), with the parts of private parts."""
    consumer = member.consumer
    subscription = consumer._subscription.subscription
    state = subscription.assignment.state_value(TP)
    coordinator = GroupCoordinator(consumer._client, SubscriptionState(), group_id="group")
    producer = AIOKafkaProducer()
    yield [
        *((consumer, name) for name in ("_client", "_coordinator", "_subscription")),
        (consumer._subscription, "subscription"),
        (subscription, "assignment"),
        (subscription.assignment, "state_value"),
        *((type(state), name) for name in ("has_valid_position", "position")),
        *(
            (coordinator, name)
            for name in ("_commit_lock", "_do_commit_offsets", "_max_poll_interval", "generation", "member_id")
        ),
        *((producer, name) for name in ("_sender", "_message_accumulator", "client")),
        (producer._sender, "sender_task"),
        (producer._message_accumulator, "fail_all"),
        *((partition_records(b""), name) for name in ("_unpack_records", "next_fetch_offset")),
        (DefaultRecordBatch, "next_offset"),
    ]
    await coordinator.close()
    await producer.stop()


def private_names(tree: ast.AST) -> set[str]:
    """Return the underscored attributes that a module reads from anything but `self`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match(r"_[^_]", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }


async def test_private_parts_of_aiokafka_that_the_worker_uses_exist(parts: list[tuple[object, str]]):
    assert [(owner, name) for owner, name in parts if not hasattr(owner, name)] == []


async def test_every_private_name_in_the_code_is_among_the_parts_and_in_a_note(parts: list[tuple[object, str]]):
    sources = [path.read_text() for path in sorted(FOLDER.glob("*.py"))]
    used = set().union(*(private_names(ast.parse(source)) for source in sources)) | {"_unpack_records"}
    assert used == {name for _, name in parts if name.startswith("_")}
    notes = [note for source in sources for note in re.findall(r"# NOTE:.*(?:\n\s+#.*)*", source)]
    assert {name for name in used if not any(f"`{name}`" in note for note in notes)} == set()


def test_fast_records_have_the_fields_of_aiokafkas_in_their_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetcher, "ConsumerRecord", ConsumerRecord)
    assert FetchedRecord.__struct_fields__ == tuple(field.name for field in dataclasses.fields(ConsumerRecord))
    use_fast_records()
    batches = bytes(record_batch([(b"one", "a"), (b"two", "b")]))
    records = list(partition_records(batches))
    assert [type(record) for record in records] == [FetchedRecord, FetchedRecord]
    assert [(record.offset, record.value, record.headers[0][0]) for record in records] == [
        (0, b"one", "a"),
        (1, b"two", "b"),
    ]


async def test_private_commit_takes_the_assignment_and_the_offsets():
    assert list(inspect.signature(GroupCoordinator._do_commit_offsets).parameters) == ["self", "assignment", "offsets"]


async def test_lag_ends_at_the_last_stable_offset(member: GroupMember):
    partition = Partition(*TP)
    state: Any = member.consumer._subscription.subscription.assignment.state_value(TP)
    state.highwater = 10
    assert member.lag(partition) == 0, "no position yet"
    state.seek(3)
    assert member.lag(partition) == 7
    state.lso = 6
    assert member.lag(partition) == 3
    state.seek(8)
    assert member.lag(partition) == 0


def test_corrupt_record_is_located_by_the_traceback():
    batch = record_batch([(b"value", name) for name in ("good", "bad", "good")]).replace(b"bad", b"b\xffd")
    with pytest.raises(DECODE_ERRORS) as caught:
        list(partition_records(bytes(batch)))
    assert CorruptRecord.from_error(caught.value) == CorruptRecord(TP, offset=1, next_batch=3)
