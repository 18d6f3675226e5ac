"""The id of a topic, by which one that was deleted and created again differs from its predecessor of the same name.

KIP-516: brokers since Kafka 2.8 give every topic an id, and tell it in the metadata from version 10 on; aiokafka 0.14
requests version 5, so the request and the response of version 10 are defined here.
"""

import base64
from dataclasses import dataclass
from typing import Any

from aiokafka import errors
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from worker.config import KafkaConfig
from worker.errors import TopicRecreated
from worker.interfaces import Clock
from worker.kafka.client import client_options, retry_at_start

ID_BYTES = 16
NO_ID = bytes(ID_BYTES)
PREFIX = "topic-id="  # of the metadata that is committed with an offset


class Uuid(AbstractType[bytes]):
    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: Any) -> bytes:
        return data.read(ID_BYTES)


class MetadataResponseV10(Response):
    # aiokafka declares properties, and overrides them in the same way.
    API_KEY = 3  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    API_VERSION = 10  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString()),
                ("port", Int32),
                ("rack", CompactString()),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString()),
                ("topic_id", Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class MetadataRequestV10(RequestStruct):
    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = MetadataResponseV10
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class TopicIdRequest(Request[MetadataRequestV10]):
    API_KEY = 3

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def build(self, request_struct_class: type[MetadataRequestV10]) -> MetadataRequestV10:
        return request_struct_class([(NO_ID, self._topic, {})], False, False, False, {})


async def fetch_topic_id(client: AIOKafkaClient, topic: str) -> str | None:
    """Return the topic's id as Kafka prints it; None when there is no such topic or the broker tells no ids.

    Raises KafkaError.
    """
    node = client.get_random_node()
    if node is None:
        raise errors.NodeNotReadyError("no broker is known")
    try:
        response = await client.send(node, TopicIdRequest(topic))
    except NotImplementedError:  # by aiokafka: the broker does not support the version
        return None
    ((_, _, topic_id, *_),) = response.topics
    return None if topic_id == NO_ID else base64.urlsafe_b64encode(topic_id).rstrip(b"=").decode()


async def read_topic_id(config: KafkaConfig, clock: Clock, topic: str) -> str | None:
    """Do the same with a client of its own. Raises SourceError, SourceUnavailable."""

    async def attempt() -> str | None:
        client = AIOKafkaClient(**client_options(config))
        try:
            await client.bootstrap()
            return await fetch_topic_id(client, topic)
        finally:
            await client.close()

    return await retry_at_start(config, clock, attempt)


@dataclass(slots=True)
class TopicIdentity:
    """The topic that a process reads, by name and id."""

    topic: str
    topic_id: str | None = None  # None: not known yet, or not told by the broker

    def check(self, topic_id: str | None) -> None:
        """Compare the id that the topic has now. Raises TopicRecreated."""
        if self.topic_id is None:
            self.topic_id = topic_id
        elif topic_id not in (None, self.topic_id):
            raise TopicRecreated(
                f"topic {self.topic} has id {topic_id}, but this process read id {self.topic_id}: the topic was deleted"
                " and created again; set sequences.topic_generation to a new value and start again: the new topic is "
                "then read from its beginning"
            )

    @property
    def commit_metadata(self) -> str:
        """The text to commit with an offset."""
        return f"{PREFIX}{self.topic_id}" if self.topic_id else ""

    def owns_commit(self, metadata: str | None) -> bool:
        """Whether an offset that was committed with this text may be of this topic."""
        if not metadata or not metadata.startswith(PREFIX) or self.topic_id is None:
            return True
        return metadata == self.commit_metadata
