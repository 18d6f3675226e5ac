"""The `items` topic. Every process reads all of it before it is ready, without a consumer group, then follows it: a new
item's content is known before its first event is ranked.

The topic is compacted: an item's latest record counts. A tombstone delists the item: it is not recommended until a
record brings it back. An invalid record is counted and skipped; the next record with the same key replaces it. With a
state folder the items are kept in a journal, and a restart reads only what has been added since.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition, errors

from pipeline.records import Id, Item
from worker import logging, metrics
from worker.config import KafkaConfig
from worker.interfaces import Clock
from worker.items.journal import ItemJournal
from worker.kafka.client import list_partitions, retry_at_start
from worker.kafka.error_causes import is_permanent
from worker.kafka.topic_reader import POLL_MS, OffsetRange, make_consumer, offset_ranges, read_ranges
from worker.stream.codec import InvalidRecord, decoder_named, decoders_for, header_values

log = logging.get("items")
SAVE_INTERVAL_S = 10.0  # between two saves: a restart reads at most this much of the topic again
CHUNK_ITEMS = 500  # items per call in the pipeline's thread: a call delays ranking by 20 ms
RETRY_S = 2.0  # until the next poll of a broker that does not answer
DECODERS = decoders_for(Item)
Change = tuple[str, Item | None]  # an item's id and its record; None: delisted
UpdateItems = Callable[[list[Item], list[str], bool], Awaitable[None]]


class ItemFeed:
    """Reads the items topic and passes its records on.

    update_items: called with records, delisted ids, and whether they arrived after the start
    journal: keeps the items across restarts; None: each start reads the whole topic
    """

    def __init__(
        self, config: KafkaConfig, update_items: UpdateItems, clock: Clock, journal: ItemJournal | None = None
    ) -> None:
        self._config = config
        self._update_items = update_items
        self._clock = clock
        self._journal = journal
        self._consumer: AIOKafkaConsumer | None = None
        self._has_warned = False
        self._saved_s = 0.0

    async def start(self) -> None:
        """Return when the whole topic has been read, or does not exist. SourceError, SourceUnavailable."""
        if not (partitions := await list_partitions(self._config, self._clock, self._config.items_topic)):
            log.info("no items topic: items are known from events only", topic=self._config.items_topic)
            return
        self._consumer = make_consumer(self._config)
        await retry_at_start(self._config, self._clock, self._consumer.start)
        self._consumer.assign(partitions)
        ranges = await self._without_restored(await offset_ranges(self._consumer, partitions))
        records = 0
        async for polled in read_ranges(self._consumer, ranges, self._config, self._clock):
            records += await self._apply(polled, live=False)
        await self._save()
        log.info("items topic read", topic=self._config.items_topic, records=records)

    async def run(self) -> None:
        """Follow the topic until cancelled, waiting for an unreachable broker."""
        while self._consumer is not None:
            try:
                await self._poll(self._consumer)
                if self._clock.monotonic() >= self._saved_s + SAVE_INTERVAL_S:
                    await self._save()
            except errors.KafkaError as error:
                if is_permanent(error):
                    log.error("stopped following the items topic", error=str(error))
                    return
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    async def _without_restored(self, ranges: dict[TopicPartition, OffsetRange]) -> dict[TopicPartition, OffsetRange]:
        """Restore the journal; return what it does not cover."""
        if self._journal is None:
            return ranges
        restored = await self._journal.restore({each: offsets.end for each, offsets in ranges.items()})
        return {each: OffsetRange(restored.get(each, begin), end) for each, (begin, end) in ranges.items()}

    async def _save(self) -> None:
        if self._journal is not None and self._consumer is not None:
            positions = {
                partition: await self._consumer.position(partition) for partition in self._consumer.assignment()
            }
            await self._journal.save(positions)
            self._saved_s = self._clock.monotonic()

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        polled = await consumer.getmany(timeout_ms=POLL_MS, max_records=self._config.max_poll_records)
        await self._apply(polled, live=True)

    async def _apply(self, polled: Mapping[TopicPartition, list[ConsumerRecord]], live: bool) -> int:
        """Pass the records on in chunks and return their number."""
        records = [record for partition_records in polled.values() for record in partition_records]
        changes = list(self._changes(records))
        for start in range(0, len(changes), CHUNK_ITEMS):
            latest = dict(changes[start : start + CHUNK_ITEMS])
            items = [item for item in latest.values() if item is not None]
            delisted = [item_id for item_id, item in latest.items() if item is None]
            await self._update_items(items, delisted, live)
            metrics.ITEMS.inc(len(items))
            metrics.DELISTED_ITEMS.inc(len(delisted))
        return len(records)

    def _changes(self, records: Iterable[ConsumerRecord]) -> Iterator[Change]:
        for record in records:
            try:
                yield _decode_record(record)
            except (msgspec.DecodeError, UnicodeDecodeError, InvalidRecord) as error:
                metrics.INVALID_ITEMS.inc()
                if not self._has_warned:
                    self._has_warned = True
                    log.warning(
                        "skipping invalid item record (logged once, then counted)",
                        partition=record.partition,
                        offset=record.offset,
                        error=str(error),
                    )


def _decode_record(record: ConsumerRecord) -> Change:
    if record.value is None:
        return msgspec.convert((record.key or b"").decode(), Id), None
    item = decoder_named(header_values(record.headers), DECODERS).decode(record.value)
    return item.item_id, item
