"""Slates into their topic and into Redis, dead dead_letters into theirs."""

import asyncio
from collections.abc import Iterator, Sequence

import msgspec

from pipeline.records import Slate
from worker.clock import WallClock
from worker.config import Config
from worker.errors import SinkError
from worker.interfaces import Clock, DeadLetter, SlateWriter
from worker.kafka.client import ensure_topics
from worker.kafka.producer import MAX_RECORD_BYTES, BatchProducer, Message

SLATE_HEADERS = [("content-type", b"application/json"), ("schema", b"slate/1")]
HEADER_PREFIX = "millrace-"  # headers that a dead letter gets; the original ones are kept before them
KEPT_BYTES = 64 << 10  # of a value too large to be buried whole
_encode = msgspec.json.Encoder().encode


class KafkaSink:
    """Implements Sink. `send` again with the same sequence waits for what is under way instead of sending it twice."""

    def __init__(self, config: Config, store: SlateWriter, clock: Clock | None = None) -> None:
        self._config, self._store, self._clock = config.kafka, store, clock or WallClock()
        self._producer = BatchProducer(config.kafka, self._clock)
        self._deliveries: dict[int, tuple[object, asyncio.Task[None]]] = {}  # by the identity of what is delivered

    async def start(self) -> None:
        """SourceError names a topic that is missing; SourceUnavailable when no broker answers in time."""
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
        """To Kafka and Redis at once. SinkUnavailable, SinkError, and what the store raises."""
        delivery = self._delivery(slates, self._config.recommendations_topic, _slate_messages(slates))
        results = await asyncio.gather(
            self._producer.wait_acknowledged(delivery), self._store.put(slates), return_exceptions=True
        )
        self._settle(slates, delivery, [error for error in results if error is not None])

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        """To the dead-letter topic, in their order per key. SinkUnavailable, SinkError."""
        delivery = self._delivery(dead_letters, self._config.dead_letter_topic, map(dead_letter_message, dead_letters))
        results = await asyncio.gather(self._producer.wait_acknowledged(delivery), return_exceptions=True)
        self._settle(dead_letters, delivery, [error for error in results if error is not None])

    def _delivery(self, what: object, topic: str, messages: Iterator[Message]) -> asyncio.Task[None]:
        _, delivery = self._deliveries.get(id(what), (None, None))
        if delivery is None:
            delivery = self._producer.start_delivery(topic, list(messages))
            self._deliveries[id(what)] = what, delivery
        return delivery

    def _settle(self, what: object, delivery: asyncio.Task[None], failures: list[BaseException]) -> None:
        """Forget it when all is well or it failed in Kafka; one that is late, or waits for Redis, is kept."""
        failed = delivery.done() and (delivery.cancelled() or delivery.exception() is not None)
        if failed or not failures:
            self._deliveries.pop(id(what), None)
        # What repeating cannot mend comes first.
        for error in sorted(failures, key=lambda error: getattr(error, "retriable", False)):
            raise error


def _slate_messages(slates: Sequence[Slate]) -> Iterator[Message]:
    for slate in slates:
        value = _encode(slate)
        if len(value) > MAX_RECORD_BYTES:
            raise SinkError(
                f"the slate of user {slate.user_id!r} has {len(value)} bytes, more than the {MAX_RECORD_BYTES} that "
                f"Kafka takes: lower pipeline.slate_size"
            )
        yield Message(slate.user_id.encode(), value, SLATE_HEADERS)


def dead_letter_message(letter: DeadLetter) -> Message:
    """The record as it was, with its reason and its origin in headers. Of one that would not fit with them the value's
    beginning is kept, and its size in `millrace-truncated`: the original stays where its origin says."""
    (topic, partition), _, offset = letter.record_offset
    origin = {"reason": letter.reason[:1000], "topic": topic, "partition": partition, "offset": offset}
    key, value = letter.key, letter.value
    headers = [(name, content) for name, content in letter.headers if not name.startswith(HEADER_PREFIX)]
    size = len(key or b"") + len(value or b"") + sum(len(name) + len(content or b"") for name, content in headers)
    if size > MAX_RECORD_BYTES - KEPT_BYTES:
        origin["truncated"], key, value, headers = size, (key or b"")[:256], (value or b"")[:KEPT_BYTES], []
    headers += [(HEADER_PREFIX + name, str(content).encode()) for name, content in origin.items()]
    return Message(key, value, headers)
