"""Whole batches into Kafka: one idempotent producer, a request per broker, every batch acknowledged by all replicas.

The producer repeats by itself for as long as a broker is away, in order and without duplicates; so a delivery is never
begun twice because it is late. Only a producer that has failed for good is replaced, and then nothing of the old one
may leave any more: it could overtake what is sent again.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from struct import unpack
from typing import NamedTuple

from aiokafka import AIOKafkaProducer, errors
from aiokafka.producer.message_accumulator import BatchBuilder

from worker import logging
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SinkError, SinkUnavailable
from worker.interfaces import Clock
from worker.kafka.client import client_options, is_permanent, retry_at_start

log = logging.get("producer")
BATCH_BYTES = 256 << 10  # per partition and request; 256 slates of 1.6 KB over 8 partitions fill a fifth of it
MAX_RECORD_BYTES = 1_000_000  # brokers take batches of 1,048,588 bytes unless told otherwise
STOP_S = 10.0
UNDELIVERABLE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError, errors.InvalidTopicError)
_MASK, _M = 0xFFFFFFFF, 0x5BD1E995


class Message(NamedTuple):
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]] = []  # noqa: RUF012 - aiokafka takes nothing but a list; never changed


class BatchProducer:
    """`async with BatchProducer(config) as producer`; any number of deliveries at a time."""

    def __init__(self, config: KafkaConfig, clock: Clock | None = None) -> None:
        self._config, self._clock = config, clock or WallClock()
        self._options = client_options(config)
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """SourceUnavailable after `start_timeout_s`, SourceError when refused."""
        await retry_at_start(self._config, self._clock, self._started_producer)

    async def stop(self) -> None:
        """What is under way gets STOP_S."""
        producer, self._producer = self._producer, None
        if producer is not None and not await _within(STOP_S, producer.stop()):
            await _abort(producer)

    async def __aenter__(self) -> "BatchProducer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def send(self, topic: str, messages: Iterable[Message]) -> None:
        """Returns when all are acknowledged; of equal keys in their order. SinkUnavailable, SinkError."""
        await self.wait_acknowledged(self.start_delivery(topic, messages))

    def start_delivery(self, topic: str, messages: Iterable[Message]) -> asyncio.Task[None]:
        """A delivery under way. Cancelling who waits for it does not stop it."""
        return asyncio.create_task(self._deliver(topic, messages), name=f"deliver to {topic}")

    async def wait_acknowledged(self, delivery: asyncio.Task[None]) -> None:
        """SinkUnavailable when it takes longer than `request_timeout_ms` (it goes on: wait again), or when it failed
        and may be begun again; SinkError when it can never succeed."""
        await asyncio.wait({delivery}, timeout=self._config.request_timeout_ms / 1000)
        where = f"kafka {self._config.bootstrap_servers}"
        if not delivery.done():
            raise SinkUnavailable(f"{where} has acknowledged nothing for {self._config.request_timeout_ms} ms")
        error = delivery.exception()
        if isinstance(error, UNDELIVERABLE) or (error is not None and is_permanent(error)):
            raise SinkError(
                f"{where} takes no such record: {error!r}; see the topic's max.message.bytes and this client's rights"
            ) from error
        if isinstance(error, errors.KafkaError | OSError):
            raise SinkUnavailable(f"{where}: {error!r}") from error
        delivery.result()

    async def _deliver(self, topic: str, messages: Iterable[Message]) -> None:
        producer = await self._started_producer()
        try:
            partitions = sorted(await producer.partitions_for(topic))
            batches = _batches(producer, partitions, messages)
            acks = [await self._enqueue(producer, topic, partition, batch) for partition, batch in batches]
            for outcome in await asyncio.gather(*acks, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        except errors.KafkaError as error:
            await self._replace(producer, error)
            raise

    async def _enqueue(
        self, producer: AIOKafkaProducer, topic: str, partition: int, batch: BatchBuilder
    ) -> asyncio.Future:
        while True:
            try:
                return await producer.send_batch(batch, topic, partition=partition)
            except errors.KafkaTimeoutError:  # the partition's last batch still waits for its broker
                log.warning("a batch waits for its broker", topic=topic, partition=partition)

    async def _started_producer(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **self._options,
                    enable_idempotence=True,
                    acks="all",
                    linger_ms=self._config.linger_ms,
                    max_batch_size=BATCH_BYTES,
                )
                try:
                    await producer.start()
                except BaseException:
                    await _abort(producer)
                    raise
                self._producer = producer
            return self._producer

    async def _replace(self, producer: AIOKafkaProducer, error: errors.KafkaError) -> None:
        if self._producer is producer:
            self._producer = None
            log.warning("the producer failed and is replaced", error=repr(error))
            await _abort(producer)


def _batches(
    producer: AIOKafkaProducer, partitions: Sequence[int], messages: Iterable[Message]
) -> Iterator[tuple[int, BatchBuilder]]:
    """The messages by partition, in their order; a partition's full batches come before its last one."""
    filling: dict[int, BatchBuilder] = {}
    for message in messages:
        # Without a key the value decides: the same letter goes to the same partition.
        key = (message.value or b"") if message.key is None else message.key
        partition = partitions[(murmur2(key) & 0x7FFFFFFF) % len(partitions)]
        batch = filling.get(partition)
        if batch is None or not _append(batch, message):
            if batch is not None:
                yield partition, batch
            filling[partition] = batch = producer.create_batch()
            _append(batch, message)  # the first one always fits
    yield from filling.items()


def _append(batch: BatchBuilder, message: Message) -> bool:
    key, value, headers = message
    return batch.append(timestamp=None, key=key, value=value, headers=headers) is not None


def murmur2(data: bytes) -> int:
    """The hash by which Kafka's clients choose a key's partition, a word at a time: 1.5 us for 11 bytes, where
    aiokafka's takes 4.5."""
    whole = len(data) & ~3
    h = 0x9747B28C ^ len(data)
    for k in unpack(f"<{whole >> 2}I", data[:whole]):
        k = k * _M & _MASK
        k ^= k >> 24
        h = h * _M & _MASK ^ k * _M & _MASK
    if rest := data[whole:]:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ h >> 15


async def _abort(producer: AIOKafkaProducer) -> None:
    """Stop without delivering: sender first, then its connections, then whoever still waits is told."""
    # NOTE: private parts of aiokafka 0.14, whose `stop()` waits until everything is delivered.
    sender = producer._sender.sender_task
    if sender is not None:
        sender.cancel()
    await _within(STOP_S, producer.client.close())
    if sender is not None:
        await asyncio.wait({sender}, timeout=STOP_S)
    producer._message_accumulator.fail_all(errors.ProducerClosed())
    await _within(STOP_S, producer.stop())


async def _within(timeout_s: float, act: Awaitable[None]) -> bool:
    try:
        await asyncio.wait_for(act, timeout_s)
    except (TimeoutError, errors.KafkaError):
        return False
    return True
