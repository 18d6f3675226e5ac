"""The dead-letter topic: list its records, and requeue each of them once.

The consumer group `<kafka.group_id>.requeue` remembers on the broker which records were requeued: its committed offset,
and in the commit's metadata the runs of offsets after it (a requeue by reason leaves holes). Offset, runs and records
are written in one transaction. Kafka forgets them `offsets.retention.minutes` (7 days) after the last requeue: keep
dead letters no longer than that.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import msgspec
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SinkError, SinkUnavailable
from worker.interfaces import Clock
from worker.kafka.client import client_options, ensure_coordinator, ensure_topics, retry_at_start, with_admin
from worker.kafka.error_causes import explain, is_permanent
from worker.kafka.sink import HEADER_PREFIX
from worker.kafka.topic_reader import OffsetRange, make_consumer, offset_ranges, read_ranges

CHUNK = 2000  # dead letters per transaction
METADATA_BYTES = 4000  # brokers accept 4,096 (offset.metadata.max.bytes)


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


class DeadLetterTopic:
    """Reads and requeues dead letters.

    SourceUnavailable, SourceError when Kafka is unreachable or refuses a read; SinkUnavailable, SinkError for a write.
    """

    def __init__(self, config: KafkaConfig, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or WallClock()
        self.group = f"{config.group_id}.requeue"

    async def read(self, newest: int | None = None) -> list[DeadLetterRecord]:
        """Return the dead letters in time order. newest: this many of each partition; None: all."""
        await ensure_topics(self._config, self._clock, [self._config.dead_letter_topic])
        progress = await self._progress()
        records = await retry_at_start(self._config, self._clock, lambda: self._read(newest))
        letters = [_parse(record, progress.get(record.partition, RequeueProgress(0))) for record in records]
        return sorted(letters, key=lambda letter: (letter.ts_ms, letter.partition, letter.offset))

    async def requeue(self, reason: str = "", limit: int | None = None) -> list[DeadLetterRecord]:
        """Send the records whose reason contains `reason` back to their origin, oldest first; return them."""
        producer = AIOKafkaProducer(**client_options(self._config), transactional_id=self.group)
        try:
            # Before the progress is read: this ends the open transaction of another requeue, and fences that one.
            await retry_at_start(self._config, self._clock, producer.start)
            letters = await self.read()
            selected = requeueable(letters, reason, limit)
            await ensure_topics(self._config, self._clock, sorted({letter.origin[0] for letter in selected}))
            progress = await self._progress()
            for start in range(0, len(selected), CHUNK):
                await self._requeue_chunk(producer, letters, selected[start : start + CHUNK], progress)
        finally:
            await producer.stop()
        return selected

    async def _requeue_chunk(
        self,
        producer: AIOKafkaProducer,
        letters: Sequence[DeadLetterRecord],
        chunk: Sequence[DeadLetterRecord],
        progress: dict[int, "RequeueProgress"],
    ) -> None:
        offsets: dict[TopicPartition, OffsetAndMetadata] = {}
        for partition in {letter.partition for letter in chunk}:
            before = progress.get(partition, RequeueProgress(0))
            sent = {letter.offset for letter in chunk if letter.partition == partition}
            remaining = [each for each in letters if each.partition == partition and each.offset >= before.offset]
            progress[partition] = before.extended(sent, sorted(remaining, key=lambda letter: letter.offset))
            offsets[TopicPartition(self._config.dead_letter_topic, partition)] = progress[partition].to_offset(
                self.group
            )
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000), producer.transaction():
                await asyncio.gather(*await _send(producer, chunk))
                await producer.send_offsets_to_transaction(offsets, self.group)
        except (errors.KafkaError, TimeoutError) as error:
            if is_permanent(error):
                raise SinkError(explain(self._config, error, self._config.dead_letter_topic)) from error
            raise SinkUnavailable(
                f"requeue to kafka {self._config.bootstrap_servers}: {error!r}; run it again"
            ) from error

    async def _progress(self) -> dict[int, "RequeueProgress"]:
        await ensure_coordinator(self._config, self._clock, self.group)
        offsets = await with_admin(
            self._config, self._clock, lambda admin: admin.list_consumer_group_offsets(self.group)
        )
        return {
            partition.partition: RequeueProgress.from_offset(offset)
            for partition, offset in offsets.items()
            if partition.topic == self._config.dead_letter_topic and offset.offset >= 0
        }

    async def _read(self, newest: int | None) -> list[ConsumerRecord]:
        consumer = make_consumer(self._config, self._config.dead_letter_topic)
        try:
            await consumer.start()
            offsets = await offset_ranges(consumer, sorted(consumer.assignment()))
            ranges = {each: _last_offsets(offsets[each], newest) for each in offsets}
            polls = read_ranges(consumer, ranges, self._config, self._clock)
            return [record async for polled in polls for records in polled.values() for record in records]
        finally:
            await consumer.stop()


def _last_offsets(offsets: OffsetRange, count: int | None) -> OffsetRange:
    """Return the last `count` offsets of a range; all of them for None."""
    return offsets if count is None else OffsetRange(max(offsets.begin, offsets.end - count), offsets.end)


class RequeueProgress(msgspec.Struct, frozen=True):
    """The offsets of a partition that were requeued: all before `offset`, and the runs (first, last) after it."""

    offset: int
    runs: tuple[tuple[int, int], ...] = ()

    def __contains__(self, offset: int) -> bool:
        return offset < self.offset or any(first <= offset <= last for first, last in self.runs)

    def extended(self, sent: set[int], remaining: Sequence[DeadLetterRecord]) -> "RequeueProgress":
        """Return the progress after the offsets in `sent` were requeued as well.

        remaining: the partition's dead letters from `offset` on, by offset; those not requeueable count as handled
        """

        def is_handled(letter: DeadLetterRecord) -> bool:
            return letter.offset in sent or letter.offset in self or letter.not_requeueable

        offset = self.offset
        runs: list[tuple[int, int]] = []
        for handled, group in groupby(remaining, is_handled):
            offsets = [letter.offset for letter in group]
            if handled and offsets[0] == remaining[0].offset:
                offset = offsets[-1] + 1
            elif handled:
                runs.append((offsets[0], offsets[-1]))
        return RequeueProgress(offset, tuple(runs))

    def to_offset(self, group: str) -> OffsetAndMetadata:
        """Return the commit that stores it. SinkError when the runs do not fit into its metadata."""
        metadata = ",".join(f"{first}-{last}" for first, last in self.runs)
        if len(metadata) > METADATA_BYTES:
            raise SinkError(
                f"group {group} cannot store {len(self.runs)} separate runs of requeued dead letters; requeue without "
                f"--reason, or fewer with --limit"
            )
        return OffsetAndMetadata(self.offset, metadata)

    @classmethod
    def from_offset(cls, committed: OffsetAndMetadata) -> "RequeueProgress":
        runs = [tuple(map(int, run.split("-"))) for run in (committed.metadata or "").split(",") if run]
        return cls(committed.offset, tuple((first, last) for first, last in runs))


def requeueable(
    letters: Iterable[DeadLetterRecord], reason: str = "", limit: int | None = None
) -> list[DeadLetterRecord]:
    """Return the dead letters that a requeue would send, in their order."""
    matching = [each for each in letters if not each.requeued and not each.not_requeueable and reason in each.reason]
    return matching[:limit]


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
    return int(text) if text.isascii() and text.isdigit() else -1


async def _send(producer: AIOKafkaProducer, letters: Sequence[DeadLetterRecord]) -> list[asyncio.Future]:
    """Send each record to the partition it came from, where its user's other events are; by key if that is gone."""
    partitions: Mapping[str, set[int]] = {
        topic: await producer.partitions_for(topic) for topic in {letter.origin[0] for letter in letters}
    }
    acknowledgements = []
    for letter in letters:
        topic, origin_partition, _ = letter.origin
        partition = origin_partition if origin_partition in partitions[topic] else None
        value = letter.value if letter.key is not None else letter.value or b""  # a record has a key or a value
        acknowledgements.append(
            await producer.send(topic, value, letter.key, partition=partition, headers=letter.headers)
        )
    return acknowledgements
