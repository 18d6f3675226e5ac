"""The dead-letter topic: list its records, and requeue each of them once.

The consumer group `<kafka.group_id>.requeue` remembers on the broker what was requeued: its committed offset, and in
the commit's metadata the runs of offsets after it (a requeue by reason leaves holes). Offset, runs and records are written
in one transaction. Kafka forgets them `offsets.retention.minutes` (7 days) after the last requeue: keep dead letters no
longer than that.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SinkError, SinkUnavailable, SourceUnavailable
from worker.interfaces import Clock
from worker.kafka.client import client_options, ensure_coordinator, ensure_topics, retry_at_start, with_admin
from worker.kafka.sink import HEADER_PREFIX

CHUNK = 2000  # letters a transaction
METADATA_BYTES = 4000  # brokers take 4,096 (offset.metadata.max.bytes)


class DeadLetterRecord(msgspec.Struct, frozen=True):
    """A dead letter as it lies in its topic. `origin` says where the record came from."""

    partition: int
    offset: int
    ts_ms: int
    reason: str
    origin: tuple[str, int, int]  # topic, partition, offset
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]  # the record's own
    not_requeueable: bool  # cannot be sent home: cut off because of its size, or without an origin
    requeued: bool


class DeadLetterTopic:
    """Reads and requeues. SourceUnavailable, SourceError when Kafka is away or refuses; SinkError, SinkUnavailable."""

    def __init__(self, config: KafkaConfig, clock: Clock | None = None) -> None:
        self._config, self._clock = config, clock or WallClock()
        self.group = f"{config.group_id}.requeue"

    async def read(self, newest: int | None = None) -> list[DeadLetterRecord]:
        """All letters, or of each partition the newest ones; in order of time."""
        await ensure_topics(self._config, self._clock, [self._config.dead_letter_topic])
        done = await self._progress()
        records = await retry_at_start(self._config, self._clock, lambda: self._read(newest))
        letters = [_letter(record, done.get(record.partition, RequeueProgress(0))) for record in records]
        return sorted(letters, key=lambda letter: (letter.ts_ms, letter.partition, letter.offset))

    async def requeue(self, reason: str = "", limit: int | None = None) -> list[DeadLetterRecord]:
        """Send home those whose reason contains `reason`, oldest first; returns what was sent."""
        producer = AIOKafkaProducer(**client_options(self._config), transactional_id=self.group)
        try:
            # Before the position is read: it ends another requeue's open transaction, and fences that one.
            await retry_at_start(self._config, self._clock, producer.start)
            letters = await self.read()
            wanted = requeueable(letters, reason, limit)
            await ensure_topics(self._config, self._clock, sorted({letter.origin[0] for letter in wanted}))
            done = await self._progress()
            for start in range(0, len(wanted), CHUNK):
                await self._requeue_chunk(producer, letters, wanted[start : start + CHUNK], done)
        finally:
            await producer.stop()
        return wanted

    async def _requeue_chunk(
        self,
        producer: AIOKafkaProducer,
        letters: Sequence[DeadLetterRecord],
        chunk: Sequence[DeadLetterRecord],
        done: dict[int, "RequeueProgress"],
    ) -> None:
        topic, offsets = self._config.dead_letter_topic, {}
        for partition in {letter.partition for letter in chunk}:
            before = done.get(partition, RequeueProgress(0))
            lying = [each for each in letters if each.partition == partition and each.offset >= before.offset]
            sent = {letter.offset for letter in chunk if letter.partition == partition}
            done[partition] = before.extended(sent, sorted(lying, key=lambda each: each.offset))
            offsets[TopicPartition(topic, partition)] = done[partition].to_offset(self.group)
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000), producer.transaction():
                await asyncio.gather(*await _produced(producer, chunk))
                await producer.send_offsets_to_transaction(offsets, self.group)
        except (errors.KafkaError, TimeoutError) as error:
            raise SinkUnavailable(
                f"requeue to kafka {self._config.bootstrap_servers}: {error!r}; run it again"
            ) from error

    async def _progress(self) -> dict[int, "RequeueProgress"]:
        await ensure_coordinator(self._config, self._clock, self.group)
        offsets = await with_admin(
            self._config, self._clock, lambda admin: admin.list_consumer_group_offsets(self.group)
        )
        topic = self._config.dead_letter_topic
        return {
            tp.partition: RequeueProgress.from_offset(at)
            for tp, at in offsets.items()
            if tp.topic == topic and at.offset >= 0
        }

    async def _read(self, newest: int | None) -> list[ConsumerRecord]:
        # Without a group it is assigned every partition.
        consumer = AIOKafkaConsumer(
            self._config.dead_letter_topic,
            **client_options(self._config),
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
            return await self._read_to_end(consumer, newest)
        finally:
            await consumer.stop()

    async def _read_to_end(self, consumer: AIOKafkaConsumer, newest: int | None) -> list[ConsumerRecord]:
        tps = sorted(consumer.assignment())
        first, end = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
        for tp in tps:
            consumer.seek(tp, first[tp] if newest is None else max(first[tp], end[tp] - newest))
        records: list[ConsumerRecord] = []
        while [tp for tp in tps if await consumer.position(tp) < end[tp]]:
            found = await consumer.getmany(timeout_ms=self._config.request_timeout_ms)
            if not found:
                raise SourceUnavailable(f"kafka {self._config.bootstrap_servers} stopped answering; run it again")
            records += [record for share in found.values() for record in share]
        return records


class RequeueProgress(msgspec.Struct, frozen=True):
    """What of a partition was sent home: everything before `offset`, and these runs (first, last) beyond it."""

    offset: int
    runs: tuple[tuple[int, int], ...] = ()

    def __contains__(self, offset: int) -> bool:
        return offset < self.offset or any(first <= offset <= last for first, last in self.runs)

    def extended(self, sent: set[int], lying: Sequence[DeadLetterRecord]) -> "RequeueProgress":
        """And these. `lying`: the partition's letters by offset; one that cannot be sent holds nothing up."""
        position, runs = self.offset, []
        for handled, group in groupby(
            lying, lambda each: each.offset in sent or each.offset in self or each.not_requeueable
        ):
            offsets = [letter.offset for letter in group]
            if handled and offsets[0] == lying[0].offset:
                position = offsets[-1] + 1
            elif handled:
                runs.append((offsets[0], offsets[-1]))
        return RequeueProgress(position, tuple(runs))

    def to_offset(self, group: str) -> OffsetAndMetadata:
        """SinkError when the runs do not fit."""
        text = ",".join(f"{first}-{last}" for first, last in self.runs)
        if len(text) > METADATA_BYTES:
            raise SinkError(
                f"group {group} cannot remember {len(self.runs)} separate runs of requeued letters; requeue without "
                f"--reason, or fewer with --limit"
            )
        return OffsetAndMetadata(self.offset, text)

    @classmethod
    def from_offset(cls, at: OffsetAndMetadata) -> "RequeueProgress":
        runs = [tuple(map(int, run.split("-"))) for run in (at.metadata or "").split(",") if run]
        return cls(at.offset, tuple((first, last) for first, last in runs))


def requeueable(
    letters: Iterable[DeadLetterRecord], reason: str = "", limit: int | None = None
) -> list[DeadLetterRecord]:
    """Those that a requeue would send, oldest first."""
    matching = [each for each in letters if not each.requeued and not each.not_requeueable and reason in each.reason]
    return matching[:limit]


def _letter(record: ConsumerRecord, done: RequeueProgress) -> DeadLetterRecord:
    ours = {name[len(HEADER_PREFIX) :]: text for name, text in record.headers if name.startswith(HEADER_PREFIX)}
    origin = _header_text(ours, "topic"), _number(ours, "partition"), _number(ours, "offset")
    return DeadLetterRecord(
        record.partition,
        record.offset,
        record.timestamp,
        _header_text(ours, "reason") or "(no reason: not buried by millrace)",
        origin,
        record.key,
        record.value,
        [(name, text) for name, text in record.headers if not name.startswith(HEADER_PREFIX)],
        "truncated" in ours or not origin[0],
        record.offset in done,
    )


def _header_text(headers: Mapping[str, bytes], name: str) -> str:
    return (headers.get(name) or b"").decode("utf-8", "replace")


def _number(headers: Mapping[str, bytes], name: str) -> int:
    text = _header_text(headers, name)
    return int(text) if text.isascii() and text.isdigit() else -1


async def _produced(producer: AIOKafkaProducer, chunk: Sequence[DeadLetterRecord]) -> list[asyncio.Future]:
    """To the partition that each came from (its user's other events are there), or by key where that is gone."""
    known: Mapping[str, set[int]] = {
        topic: await producer.partitions_for(topic) for topic in {letter.origin[0] for letter in chunk}
    }
    acks = []
    for letter in chunk:
        topic, partition, _ = letter.origin
        target = partition if partition in known[topic] else None
        value = letter.value if letter.key is not None else letter.value or b""  # a record has a key or a value
        acks.append(await producer.send(topic, value, letter.key, partition=target, headers=letter.headers))
    return acks
