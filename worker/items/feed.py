"""The `items` topic: what is known of items. Every process reads it whole, without a group, before it is ready, and
follows it from then on: what a new item is like is known before its first event is ranked.

The topic is compacted: its latest record of an item counts. A tombstone withdraws the item: it is recommended no more,
until a record brings it back. A record that is no item is counted and left out; the next one of the same key mends it.
With a state folder what is known is kept there, and a restart reads what has come since.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, errors

from pipeline.records import Id, Item
from worker import logging, metrics
from worker.config import KafkaConfig
from worker.interfaces import Clock
from worker.items.journal import ItemJournal
from worker.kafka.client import client_options, is_permanent, list_partitions, retry_at_start
from worker.stream.codec import InvalidRecord, decoder_named, decoders_for, header_values

log = logging.get("items")
POLL_MS = 500
SAVE_INTERVAL_S = 10.0  # between two saves: a restart reads at most so much of the topic again
CHUNK_ITEMS = 500  # learnt at once: so long ranking waits, 20 ms
RETRY_S = 2.0  # before the next poll of a broker that does not answer
DECODERS = decoders_for(Item)
Change = tuple[str, Item | None]  # of an item, its record; None: withdrawn
UpdateItems = Callable[[list[Item], list[str], bool], Awaitable[None]]


class ItemFeed:
    """`learn(items, withdrawn, news)` takes over records and withdrawals, in the thread that owns the catalogue; `news`
    are those that come after the start. state: where what is known survives a restart; None: nowhere."""

    def __init__(
        self, config: KafkaConfig, update_items: UpdateItems, clock: Clock, journal: ItemJournal | None = None
    ) -> None:
        self._config, self._update_items, self._clock, self._journal = config, update_items, clock, journal
        self._consumer: AIOKafkaConsumer | None = None
        self._warned, self._saved_s = False, 0.0

    async def start(self) -> None:
        """Returns when the whole topic is known, or when there is none. SourceError, SourceUnavailable."""
        if not (partitions := await list_partitions(self._config, self._clock, self._config.items_topic)):
            log.info("no topic of items: they are known by their events alone", topic=self._config.items_topic)
            return
        self._consumer = AIOKafkaConsumer(
            **client_options(self._config),
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",  # where the topic has lost what was to be read next, all that is left is read
        )
        await retry_at_start(self._config, self._clock, self._consumer.start)
        self._consumer.assign(partitions)
        await self._consumer.seek_to_beginning(*partitions)
        ends, read = await self._consumer.end_offsets(partitions), 0
        if self._journal is not None:
            for partition, offset in (await self._journal.restore(ends)).items():
                self._consumer.seek(partition, offset)
        while any([await self._consumer.position(tp) < end for tp, end in ends.items()]):
            read += await self._poll(live=False)
        await self._save()
        log.info("items are known", topic=self._config.items_topic, records=read)

    async def run(self) -> None:
        """Follows the topic until it is cancelled; a broker that is away is waited for."""
        while self._consumer is not None:
            try:
                await self._poll(live=True)
                if self._clock.monotonic() >= self._saved_s + SAVE_INTERVAL_S:
                    await self._save()
            except errors.KafkaError as error:
                if is_permanent(error):
                    log.error("items are followed no more", error=str(error))
                    return
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    async def _save(self) -> None:
        if self._journal is not None and self._consumer is not None:
            positions = {tp: await self._consumer.position(tp) for tp in self._consumer.assignment()}
            await self._journal.save(positions)
            self._saved_s = self._clock.monotonic()

    async def _poll(self, live: bool) -> int:
        """One poll; the number of its records."""
        assert self._consumer is not None, "started"
        polled = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=self._config.max_poll_records)
        records = [record for part in polled.values() for record in part]
        changes = list(self._changes(records))
        for start in range(0, len(changes), CHUNK_ITEMS):
            latest = dict(changes[start : start + CHUNK_ITEMS])
            items = [item for item in latest.values() if item is not None]
            withdrawn = [item_id for item_id, item in latest.items() if item is None]
            await self._update_items(items, withdrawn, live)
            metrics.ITEMS.inc(len(items))
            metrics.DELISTED_ITEMS.inc(len(withdrawn))
        return len(records)

    def _changes(self, records: Iterable[ConsumerRecord]) -> Iterable[Change]:
        for record in records:
            try:
                yield _change(record)
            except (msgspec.DecodeError, UnicodeDecodeError, InvalidRecord) as error:
                metrics.INVALID_ITEMS.inc()
                if not self._warned:
                    self._warned = True
                    log.warning("a record is no item: left out; said once, then counted", partition=record.partition,
                                offset=record.offset, error=str(error))  # fmt: skip


def _change(record: ConsumerRecord) -> Change:
    if record.value is None:
        return msgspec.convert((record.key or b"").decode(), Id), None
    item = decoder_named(header_values(record.headers), DECODERS).decode(record.value)
    return item.item_id, item
