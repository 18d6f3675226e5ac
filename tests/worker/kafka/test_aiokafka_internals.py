"""Private parts of aiokafka that worker/kafka relies on: an upgrade that changes them fails here, without a broker."""

import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from tests.kafka.broker import RecordingListener
from worker.config import KafkaConfig
from worker.interfaces import Partition
from worker.kafka.consumer_group import GroupMember
from worker.kafka.corrupt_record import DECODE_ERRORS, CorruptRecord

TP = TopicPartition("events", 0)


@pytest.fixture
async def member() -> AsyncIterator[GroupMember]:
    """A member that is assigned one partition and never connects."""
    member = GroupMember(KafkaConfig(), RecordingListener())
    member.consumer.subscribe([TP.topic])
    member.consumer._subscription.assign_from_subscribed({TP})
    yield member
    await member.consumer.stop()


def record_batch(header_names: list[str]) -> bytearray:
    """One record per header name, from offset 0."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 20,
    )
    for offset, name in enumerate(header_names):
        builder.append(offset, 0, None, b"value", [(name, b"")])
    return builder.build()


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


def missing(owner: object, *names: str) -> list[str]:
    owner_name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
    return [f"{owner_name}.{name}" for name in names if not hasattr(owner, name)]


async def test_private_names_of_aiokafka_that_the_worker_uses_exist(member: GroupMember):
    consumer = member.consumer
    subscription = consumer._subscription.subscription
    coordinator = GroupCoordinator(consumer._client, SubscriptionState(), group_id="group")
    producer = AIOKafkaProducer()
    found_missing = [
        *missing(consumer, "_coordinator", "_subscription"),
        *missing(subscription, "assignment"),
        *missing(subscription.assignment, "state_value"),
        *missing(type(subscription.assignment.state_value(TP)), "has_valid_position", "position"),
        *missing(subscription.assignment.state_value(TP), "highwater", "lso"),
        *missing(coordinator, "_commit_lock", "_do_commit_offsets", "generation"),
        *missing(producer, "_sender", "_message_accumulator", "client"),
        *missing(producer._sender, "sender_task"),
        *missing(producer._message_accumulator, "fail_all"),
        *missing(partition_records(b""), "_unpack_records", "next_fetch_offset"),
    ]
    parameters = list(inspect.signature(coordinator._do_commit_offsets).parameters)
    await coordinator.close()
    await producer.stop()
    assert found_missing == []
    assert parameters == ["assignment", "offsets"]


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
    batch = record_batch(["good", "bad", "good"]).replace(b"bad", b"b\xffd")
    with pytest.raises(DECODE_ERRORS) as caught:
        list(partition_records(bytes(batch)))
    assert CorruptRecord.from_error(caught.value) == CorruptRecord(TP, offset=1, next_batch=3)
