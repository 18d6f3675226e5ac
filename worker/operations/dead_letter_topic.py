"""The dead-letter topic: its records, oldest first, and which of them were requeued.

The consumer group `<kafka.group_id>.requeue` remembers on the broker which records were requeued: its committed offset,
and in the commit's metadata the runs of offsets after it (a requeue by reason leaves holes). Kafka forgets them
`offsets.retention.minutes` (7 days) after the last requeue: keep dead letters no longer than that.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from hashlib import blake2b
from heapq import heappop, heappush

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.interfaces import Clock
from worker.kafka.client import ensure_coordinator, ensure_topics, retry_at_start, stop_client, with_admin
from worker.kafka.sink import HEADER_PREFIX
from worker.kafka.topic_reader import OffsetRange, make_consumer, offset_ranges, read_ranges
from worker.operations.requeue_progress import RequeueProgress

Part = Callable[[int, OffsetRange], OffsetRange]  # of a partition's number and offsets: those to read
MAX_DIGITS = 18  # of a number in a header, as many as 64 bits always hold; Python refuses to read 5,000


class DeadLetterRecord(msgspec.Struct, frozen=True):
    """A dead letter as its topic holds it."""

    partition: int
    offset: int
    ts_ms: int
    reason: str
    origin: tuple[str, int, int]  # topic, partition, offset that the record came from
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]  # the record's own
    not_requeueable: bool  # truncated because of its size, or without an origin
    requeued: bool

    @property
    def size(self) -> int:
        return len(self.key or b"") + len(self.value or b"") + sum(len(name) + len(each) for name, each in self.headers)

    def identity(self) -> bytes:
        """Return what all copies of a record have in common: a worker that restarts may send one again.

        The content counts, too: after the topic was re-created, another record may have the same origin.
        """
        origin = self.origin if self.origin[2] >= 0 else (self.partition, self.offset)
        content = msgspec.msgpack.encode((origin, self.key, self.value))
        return blake2b(content, digest_size=8).digest()


class DeadLetterTopic:
    """Reads dead letters. SourceUnavailable, SourceError when Kafka is unreachable or refuses a read."""

    def __init__(self, config: KafkaConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.clock = clock or WallClock()
        self.group = f"{config.group_id}.requeue"

    async def read(self, newest: int) -> list[DeadLetterRecord]:
        """Return the newest dead letters, this many of each partition, in time order."""

        def last_offsets(_: int, offsets: OffsetRange) -> OffsetRange:
            return OffsetRange(max(offsets.begin, offsets.end - newest), offsets.end)

        progress = await self.progress()
        letters = [letter async for letter in self.letters(progress, last_offsets)]
        return sorted(letters, key=lambda letter: (letter.ts_ms, letter.partition, letter.offset))

    async def letters(self, progress: Mapping[int, RequeueProgress], part: Part) -> AsyncGenerator[DeadLetterRecord]:
        """Yield the dead letters of a part of each partition, oldest first, those of one partition by offset.

        One poll per partition is in memory.
        """
        await ensure_topics(self.config, self.clock, [self.config.dead_letter_topic])
        consumer, offsets = await retry_at_start(self.config, self.clock, self._open)
        try:
            streams = [self._records(consumer, tp, part(tp.partition, offsets[tp])) for tp in offsets]
            async with aclosing(_oldest_first(streams)) as records:
                async for record in records:
                    yield _parse(record, progress.get(record.partition, RequeueProgress()))
        finally:
            await stop_client(consumer, self.clock)

    async def progress(self) -> dict[int, RequeueProgress]:
        """Return what was requeued, by partition."""
        await ensure_coordinator(self.config, self.clock, self.group)
        offsets = await with_admin(self.config, self.clock, lambda admin: admin.list_consumer_group_offsets(self.group))
        return {
            partition.partition: RequeueProgress.from_offset(offset)
            for partition, offset in offsets.items()
            if partition.topic == self.config.dead_letter_topic and offset.offset >= 0
        }

    async def _open(self) -> tuple[AIOKafkaConsumer, dict[TopicPartition, OffsetRange]]:
        consumer = make_consumer(self.config, self.config.dead_letter_topic)
        try:
            await consumer.start()
            return consumer, await offset_ranges(consumer, sorted(consumer.assignment()), self.config)
        except BaseException:
            await stop_client(consumer, self.clock)
            raise

    async def _records(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, offsets: OffsetRange
    ) -> AsyncIterator[ConsumerRecord]:
        async for polled in read_ranges(consumer, {tp: offsets}, self.config, self.clock):
            for record in polled.get(tp, []):
                if record.offset < offsets.end:
                    yield record


async def _oldest_first(streams: Sequence[AsyncIterator[ConsumerRecord]]) -> AsyncGenerator[ConsumerRecord]:
    """Merge streams by the times of their next records."""
    heads: list[tuple[int, int, ConsumerRecord]] = []  # (time, number of the stream, its next record)

    async def push_next(number: int) -> None:
        async for record in streams[number]:
            heappush(heads, (record.timestamp, number, record))
            return

    for number in range(len(streams)):
        await push_next(number)
    while heads:
        _, number, record = heappop(heads)
        yield record
        await push_next(number)


def _parse(record: ConsumerRecord, progress: RequeueProgress) -> DeadLetterRecord:
    ours = {name[len(HEADER_PREFIX) :]: content for name, content in record.headers if name.startswith(HEADER_PREFIX)}
    topic = _header_text(ours, "topic")
    return DeadLetterRecord(
        partition=record.partition,
        offset=record.offset,
        ts_ms=record.timestamp,
        reason=_header_text(ours, "reason") or "(no reason: not written by millrace)",
        origin=(topic, _header_number(ours, "partition"), _header_number(ours, "offset")),
        key=record.key,
        value=record.value,
        headers=[(name, content) for name, content in record.headers if not name.startswith(HEADER_PREFIX)],
        not_requeueable="truncated" in ours or not topic,
        requeued=record.offset in progress,
    )


def _header_text(headers: Mapping[str, bytes], name: str) -> str:
    return (headers.get(name) or b"").decode("utf-8", "replace")


def _header_number(headers: Mapping[str, bytes], name: str) -> int:
    text = _header_text(headers, name)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else -1
