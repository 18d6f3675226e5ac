"""Records of the items topic into the pipeline: decoded one by one, applied in chunks.

Whatever goes wrong with a record, in decoding or in applying it, concerns that record alone: it is skipped, counted and
logged with its place, and the next record with the same key replaces it.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
from aiokafka import ConsumerRecord

from pipeline.records import Id, Item
from worker import logging, metrics
from worker.interfaces import Clock
from worker.kafka.corrupt_record import CorruptRecord
from worker.rate_limit import RateLimit
from worker.stream.codec import decoder_named, decoders_for, header_values

log = logging.get("items")
CHUNK_ITEMS = 500  # items per call in the pipeline's thread: a call delays ranking by 20 ms
DECODERS = decoders_for(Item)
UpdateItems = Callable[[list[Item], list[str], bool], Awaitable[None]]


class ItemChange(NamedTuple):
    """A record and its meaning: an item's new metadata, or None for a delisting."""

    record: ConsumerRecord
    item_id: str
    item: Item | None


class ItemUpdater:
    """Applies item records.

    update_items: called with records, delisted ids, and whether they arrived after the start
    """

    def __init__(self, update_items: UpdateItems, clock: Clock) -> None:
        self._update_items = update_items
        self._log_limit = RateLimit(clock.monotonic)

    async def apply(self, records: Iterable[ConsumerRecord], live: bool) -> None:
        """Apply the records in their order. live: they arrived after the start."""
        changes = list(self._decoded(records))
        for start in range(0, len(changes), CHUNK_ITEMS):
            latest = {change.item_id: change for change in changes[start : start + CHUNK_ITEMS]}
            await self._update(list(latest.values()), live)

    def skip_corrupt(self, corrupt: CorruptRecord, error: Exception) -> None:
        """Count and log a record that aiokafka cannot decode, and with it the rest of its batch."""
        self._skip(corrupt.tp.partition, corrupt.offset, error, records=corrupt.next_batch - corrupt.offset)

    def _decoded(self, records: Iterable[ConsumerRecord]) -> Iterator[ItemChange]:
        for record in records:
            try:
                yield _decode(record)
            except Exception as error:  # of whatever kind: hostile records find new ones
                self._skip(record.partition, record.offset, error)

    async def _update(self, changes: Sequence[ItemChange], live: bool) -> None:
        """Apply changes of distinct items. If that fails, halve them until the failing ones are found."""
        items = [change.item for change in changes if change.item is not None]
        delisted = [change.item_id for change in changes if change.item is None]
        try:
            await self._update_items(items, delisted, live)
        except Exception as error:
            if len(changes) == 1:
                self._skip(changes[0].record.partition, changes[0].record.offset, error)
                return
            middle = len(changes) // 2
            await self._update(changes[:middle], live)
            await self._update(changes[middle:], live)
        else:
            metrics.ITEMS.inc(len(items))
            metrics.DELISTED_ITEMS.inc(len(delisted))

    def _skip(self, partition: int, offset: int, error: Exception, records: int = 1) -> None:
        metrics.INVALID_ITEMS.inc(records)
        if (not_logged := self._log_limit.admit()) is not None:
            log.warning(
                "skipping invalid item records",
                partition=partition,
                offset=offset,
                records=records,
                error=str(error) or repr(error),
                not_logged=not_logged,
            )


def _decode(record: ConsumerRecord) -> ItemChange:
    if record.value is None:
        return ItemChange(record, msgspec.convert((record.key or b"").decode(), Id), None)
    item = decoder_named(header_values(record.headers), DECODERS).decode(record.value)
    return ItemChange(record, item.item_id, item)
