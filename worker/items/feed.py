"""The `items` topic. Every process reads all of it before it is ready, without a consumer group, then follows it: a new
item's content is known before its first event is ranked.

The topic is compacted: an item's latest record counts. A tombstone delists the item: it is not recommended until a
record brings it back. An invalid record is counted and skipped. With a state folder the items are kept in a journal,
and a restart reads only what has been added since. New partitions, and a topic that is created after the start, are
found within PARTITION_CHECK_S and read from their beginning.
"""

import asyncio
from collections.abc import Mapping

from aiokafka import AIOKafkaConsumer, TopicPartition

from worker import logging
from worker.config import KafkaConfig
from worker.deadline import Deadline
from worker.interfaces import Clock
from worker.items.journal import ItemJournal
from worker.items.updater import ItemUpdater, UpdateItems
from worker.kafka.client import list_partitions, retry_at_start, stop_client
from worker.kafka.topic_reader import OffsetRange, make_consumer, offset_ranges, poll, positions_of, read_ranges

log = logging.get("items")
PARTITION_CHECK_S = 30.0  # between two looks at the topic's partitions, one short connection each
STOP_S = 10.0


class ItemFeed:
    """Reads the items topic and passes its records on.

    update_items: called with records, delisted ids, and whether they arrived after the start
    journal: keeps the items across restarts; None: each start reads the whole topic
    """

    def __init__(
        self,
        config: KafkaConfig,
        update_items: UpdateItems,
        clock: Clock,
        journal: ItemJournal | None = None,
        partition_check_s: float = PARTITION_CHECK_S,
        deadline: Deadline | None = None,
    ) -> None:
        """deadline: of the way out; without one, stopping takes up to STOP_S."""
        self._config = config
        self._clock = clock
        self._journal = journal
        self._deadline = deadline or Deadline(clock)
        self._partition_check_s = partition_check_s
        self._updater = ItemUpdater(update_items, clock)
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._checked_s = clock.monotonic()

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """The next offset of each partition: everything before it has been applied."""
        return self._positions

    async def start(self) -> None:
        """Return when the whole topic has been read, or does not exist. SourceError, SourceUnavailable."""
        if not (partitions := await list_partitions(self._config, self._clock, self._config.items_topic)):
            log.info("no items topic: items are known from events only", topic=self._config.items_topic)
            return
        consumer = await self._connect()
        consumer.assign(partitions)
        ranges = await self._without_restored(await offset_ranges(consumer, partitions, self._config))
        records = 0
        polls = read_ranges(consumer, ranges, self._config, self._clock, self._updater.skip_corrupt)
        async for polled in polls:
            for partition_records in polled.values():
                records += len(partition_records)
                await self._updater.apply(partition_records, live=False)
        self._positions = await positions_of(consumer, ranges, self._config)
        if self._journal is not None:
            await self._journal.save(self._positions)
        log.info("items topic read", topic=self._config.items_topic, records=records)

    async def run(self) -> None:
        """Follow the topic until cancelled. SourceError, SourceUnavailable; another run continues where it ended."""
        self._seek()
        while True:
            if self._clock.monotonic() >= self._checked_s + self._partition_check_s:
                await self._follow_new_partitions()
            if self._consumer is None:
                await asyncio.sleep(self._partition_check_s)
            else:
                await self._poll(self._consumer)

    async def stop(self) -> None:
        if self._consumer is not None:
            await self._deadline.finish(self._consumer.stop(), STOP_S)

    async def _connect(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            consumer = make_consumer(self._config)
            try:
                await retry_at_start(self._config, self._clock, consumer.start)
            except BaseException:
                await stop_client(consumer, self._clock)
                raise
            self._consumer = consumer
        return self._consumer

    async def _without_restored(self, ranges: dict[TopicPartition, OffsetRange]) -> dict[TopicPartition, OffsetRange]:
        """Restore the journal; return what it does not cover."""
        if self._journal is None:
            return ranges
        restored = await self._journal.restore({each: offsets.end for each, offsets in ranges.items()})
        return {each: OffsetRange(restored.get(each, begin), end) for each, (begin, end) in ranges.items()}

    async def _follow_new_partitions(self) -> None:
        partitions = await list_partitions(self._config, self._clock, self._config.items_topic)
        self._checked_s = self._clock.monotonic()
        if new := sorted(set(partitions) - self._positions.keys()):
            consumer = await self._connect()
            ranges = await offset_ranges(consumer, new, self._config)
            self._positions |= {each: offsets.begin for each, offsets in ranges.items()}
            consumer.assign(list(self._positions))
            self._seek()
            log.info(
                "following new partitions",
                topic=self._config.items_topic,
                partitions=[each.partition for each in new],
            )

    def _seek(self) -> None:
        """Continue from the applied offsets; a new assignment has none, and a failed poll may have passed them."""
        for partition, offset in self._positions.items():
            assert self._consumer is not None, "positions are those of a consumer"
            self._consumer.seek(partition, offset)

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        for records in (await poll(consumer, self._positions, self._config, self._updater.skip_corrupt)).values():
            await self._updater.apply(records, live=True)
        self._positions = await positions_of(consumer, self._positions, self._config)
