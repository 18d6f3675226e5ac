"""Write slates to their topic and to Redis, and dead letters to theirs."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from pipeline.slates import Slate, encode_slates
from worker.clock import WallClock
from worker.config import Config
from worker.deadline import Deadline
from worker.errors import SinkError
from worker.interfaces import Clock, DeadLetter, SlateWriter
from worker.kafka.client import ensure_topics
from worker.kafka.producer import MAX_RECORD_BYTES, BatchProducer, Message

SLATE_HEADERS = [("content-type", b"application/json"), ("schema", b"slate/1")]
HEADER_PREFIX = "millrace-"  # of the headers added to a dead letter, after its original ones
TRUNCATED_KEY_BYTES = 256
TRUNCATED_VALUE_BYTES = 64 << 10  # of a value that does not fit into a dead letter


T = TypeVar("T")


class Delivery(NamedTuple):
    """Values on their way to a topic, and their messages."""

    values: object
    messages: list[Message]
    task: asyncio.Task[None]


class KafkaSink:
    """Implements Sink. Sending the same sequence again waits for its running delivery instead of sending it twice."""

    def __init__(
        self, config: Config, store: SlateWriter, clock: Clock | None = None, deadline: Deadline | None = None
    ) -> None:
        self._config = config.kafka
        self._store = store
        self._clock = clock or WallClock()
        self._producer = BatchProducer(config.kafka, self._clock, deadline)
        # By id() of the delivered sequence, which is held here so that its id is not reused.
        self._deliveries: dict[int, Delivery] = {}

    async def start(self) -> None:
        """Connect. Raises SourceError for a missing topic, SourceUnavailable when no broker answers in time."""
        await ensure_topics(
            self._config, self._clock, [self._config.recommendations_topic, self._config.dead_letter_topic]
        )
        await self._producer.start()

    async def stop(self) -> None:
        await self._producer.stop()

    async def __aenter__(self) -> "KafkaSink":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def send(self, slates: Sequence[Slate]) -> None:
        """Write to Kafka and Redis concurrently. Raises SinkUnavailable, SinkError, and the store's errors."""
        delivery = self._delivery(slates, self._config.recommendations_topic, _slate_messages)
        values = [message.value or b"" for message in delivery.messages]
        results = await asyncio.gather(
            self._producer.wait_acknowledged(delivery.task), self._store.put(slates, values), return_exceptions=True
        )
        self._settle(slates, delivery.task, [error for error in results if error is not None])

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Write to the dead-letter topic, in order per key. Raises SinkUnavailable, SinkError."""
        delivery = self._delivery(dead_letters, self._config.dead_letter_topic, _dead_letter_messages)
        results = await asyncio.gather(self._producer.wait_acknowledged(delivery.task), return_exceptions=True)
        self._settle(dead_letters, delivery.task, [error for error in results if error is not None])

    def _delivery(
        self, values: Sequence[T], topic: str, make_messages: Callable[[Sequence[T]], list[Message]]
    ) -> "Delivery":
        """Return the running delivery of these values, started if there is none."""
        delivery = self._deliveries.get(id(values))
        if delivery is None:
            messages = make_messages(values)
            delivery = Delivery(values, messages, self._producer.start_delivery(topic, messages))
            self._deliveries[id(values)] = delivery
        return delivery

    def _settle(self, values: object, delivery: asyncio.Task[None], failures: list[BaseException]) -> None:
        """Drop a delivery that succeeded or failed in Kafka; keep one that is late or waits for Redis."""
        failed = delivery.done() and (delivery.cancelled() or delivery.exception() is not None)
        if failed or not failures:
            self._deliveries.pop(id(values), None)
        # Permanent errors first.
        for error in sorted(failures, key=lambda error: getattr(error, "retriable", False)):
            raise error


def _slate_messages(slates: Sequence[Slate]) -> list[Message]:
    values = encode_slates(slates)
    for slate, value in zip(slates, values, strict=True):
        if len(value) > MAX_RECORD_BYTES:
            raise SinkError(
                f"the slate of user {slate.user_id!r} has {len(value)} bytes, Kafka accepts {MAX_RECORD_BYTES}: lower "
                "pipeline.slate_size"
            )
    return [Message(slate.user_id.encode(), value, SLATE_HEADERS) for slate, value in zip(slates, values, strict=True)]


def _dead_letter_messages(letters: Sequence[DeadLetter]) -> list[Message]:
    return [dead_letter_message(letter) for letter in letters]


def dead_letter_message(letter: DeadLetter) -> Message:
    """Return the unchanged record with its reason and its origin in headers.

    A record that would not fit with them is cut to the beginning of its value, its size in `millrace-truncated`; the
    original stays where its origin says.
    """
    (topic, partition), _, offset = letter.record_offset
    added = {"reason": letter.reason[:1000], "topic": topic, "partition": partition, "offset": offset}
    key = letter.key
    value = letter.value
    headers = [(name, content) for name, content in letter.headers if not name.startswith(HEADER_PREFIX)]
    size = len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)
    if size > MAX_RECORD_BYTES - TRUNCATED_VALUE_BYTES:
        added["truncated"] = size
        key = (key or b"")[:TRUNCATED_KEY_BYTES]
        value = (value or b"")[:TRUNCATED_VALUE_BYTES]
        headers = []
    headers += [(HEADER_PREFIX + name, str(content).encode()) for name, content in added.items()]
    return Message(key, value, headers)
