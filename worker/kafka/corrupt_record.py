"""Locate a record that aiokafka cannot decode: a header name that is not UTF-8, a batch with a wrong checksum.

aiokafka raises in the middle of a batch. It neither says where nor returns the records that it had read earlier in that
call, and no fetch can begin after the record, because a broker returns entire batches.
"""

import asyncio
import traceback
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition, errors

from worker.config import KafkaConfig
from worker.errors import SourceError

POLL_MS = 500
DECODE_ERRORS = (UnicodeDecodeError, errors.CorruptRecordException)


class CorruptRecord(NamedTuple):
    """The first record that cannot be read, and the offset of the next batch."""

    tp: TopicPartition
    offset: int
    next_batch: int

    @classmethod
    def find(cls, error: Exception) -> "CorruptRecord | None":
        """Return the record if decoding one raised the error, in whatever way; None for any other error.

        A batch whose compression this process lacks is not corrupt: the error is one of the set-up.
        """
        if isinstance(error, errors.KafkaError) and not isinstance(error, DECODE_ERRORS):
            return None
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        return cls.from_error(error) if "_unpack_records" in names else None

    @classmethod
    def from_error(cls, error: Exception) -> "CorruptRecord":
        """Read the position from the traceback of an error that decoding a record raised."""
        # NOTE: private in aiokafka 0.14: the generator `_unpack_records` and its locals `tp`, `next_batch` and `self`,
        # whose `next_fetch_offset` is the record's. Nothing public names the partition that failed or its next batch,
        # and `position()` still is the offset from which the call began to read.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        variables = next(frame.f_locals for frame in frames if frame.f_code.co_name == "_unpack_records")
        offset = variables["self"].next_fetch_offset
        batch = variables.get("next_batch")
        return cls(variables["tp"], offset, max(offset + 1, batch.next_offset if batch else 0))

    def to_error(self, config: KafkaConfig, error: Exception) -> SourceError:
        """Return an error that says where, why, and how to skip the batch."""
        topic, partition = self.tp
        end = self.next_batch - 1
        return SourceError(
            f"topic {topic}, partition {partition}, offset {self.offset}: the record cannot be decoded ({error}); all "
            f"records before it are answered and committed; its batch, offsets {self.offset} to {end}, must be skipped:"
            f" stop the group's workers, kafka-consumer-groups.sh --bootstrap-server {config.bootstrap_servers} --group"
            f" {config.group_id} --topic {topic}:{partition} --reset-offsets --to-offset {self.next_batch} --execute, "
            "start"
        )


async def read_before(consumer: AIOKafkaConsumer, corrupt: CorruptRecord, timeout_s: float) -> list[ConsumerRecord]:
    """Return the partition's records before the corrupt one, read one by one: a call that reaches it returns none.

    Raises TimeoutError, KafkaError.
    """
    records: list[ConsumerRecord] = []
    try:
        async with asyncio.timeout(timeout_s):
            while await consumer.position(corrupt.tp) < corrupt.offset:
                fetched = await consumer.getmany(corrupt.tp, timeout_ms=POLL_MS, max_records=1)
                records += fetched.get(corrupt.tp, [])
    except Exception as error:
        if CorruptRecord.find(error) is None:  # else compaction has removed what was right before it
            raise
    return records
