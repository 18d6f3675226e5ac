"""Moves partitions from one broker to another (KIP-455), which aiokafka's admin client cannot."""

import asyncio
from typing import Any

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Schema, TaggedFields

TIMEOUT_MS = 30_000


class AlterPartitionReassignmentsResponse(Response):
    # aiokafka declares properties, and overrides them in the same way.
    API_KEY = 45  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    API_VERSION = 0  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("error_message", CompactString()),
        (
            "responses",
            CompactArray(
                ("name", CompactString()),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("error_message", CompactString()),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterPartitionReassignmentsStruct(RequestStruct):
    API_KEY = 45
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = AlterPartitionReassignmentsResponse
    SCHEMA = Schema(
        ("timeout_ms", Int32),
        (
            "topics",
            CompactArray(
                ("name", CompactString()),
                (
                    "partitions",
                    CompactArray(("partition", Int32), ("replicas", CompactArray(Int32)), ("tags", TaggedFields)),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class AlterPartitionReassignmentsRequest(Request[AlterPartitionReassignmentsStruct]):
    API_KEY = 45

    def __init__(self, topic: str, partition: int, broker: int) -> None:
        self._topics = [(topic, [(partition, [broker], {})], {})]

    def build(self, request_struct_class: type[AlterPartitionReassignmentsStruct]) -> AlterPartitionReassignmentsStruct:
        return request_struct_class(TIMEOUT_MS, self._topics, {})


async def move_partitions(admin: AIOKafkaAdminClient, source: int, target: int) -> None:
    """Move every partition of broker `source` to `target`; return when none is left. KafkaError, TimeoutError."""
    moving: set[tuple[str, int]] = set()
    async with asyncio.timeout(TIMEOUT_MS / 1000):
        while left := await _partitions_of(admin, source):
            for topic, partition in left - moving:  # also of a topic that was created meanwhile
                await _move(admin, topic, partition, target)
            moving |= left
            await asyncio.sleep(0.1)


async def _move(admin: AIOKafkaAdminClient, topic: str, partition: int, broker: int) -> None:
    request = AlterPartitionReassignmentsRequest(topic, partition, broker)
    response = await admin._client.send(admin._client.get_random_node(), request)
    codes = [response.error_code, *(each[1] for _, partitions, _ in response.responses for each in partitions)]
    for code in filter(None, codes):
        raise errors.for_code(code)(f"{topic}-{partition} cannot be moved to broker {broker}")


async def _partitions_of(admin: AIOKafkaAdminClient, broker: int) -> set[tuple[str, int]]:
    topics: list[dict[str, Any]] = await admin.describe_topics()
    return {
        (topic["topic"], partition["partition"])
        for topic in topics
        for partition in topic["partitions"]
        if broker in partition["replicas"]
    }
