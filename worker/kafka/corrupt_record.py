"""What aiokafka cannot decode: a header's name that is not UTF-8, a batch whose checksum is wrong.

It raises out of the middle of a batch, says neither where, nor returns what it had already read in that call, and no
fetch can begin behind the record: a broker gives whole batches.
"""

import traceback
from typing import NamedTuple

from aiokafka import TopicPartition, errors

from worker.config import KafkaConfig
from worker.errors import SourceError

DECODE_ERRORS = (UnicodeDecodeError, errors.CorruptRecordException)


class CorruptRecord(NamedTuple):
    """Where reading ended: the first record that cannot be read, and where the next batch begins."""

    tp: TopicPartition
    offset: int
    next_batch: int

    @classmethod
    def from_error(cls, error: Exception) -> "CorruptRecord":
        """From the frame that raised one of UNDECODABLE."""
        # NOTE: private parts of aiokafka 0.14: the generator's own names.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        known = next(frame.f_locals for frame in frames if frame.f_code.co_name == "_unpack_records")
        offset, batch = known["self"].next_fetch_offset, known.get("next_batch")
        return cls(known["tp"], offset, max(offset + 1, batch.next_offset if batch else 0))

    def to_error(self, config: KafkaConfig, error: Exception) -> SourceError:
        """One sentence: where, why, and how to go on behind it."""
        (topic, partition), end = self.tp, self.next_batch - 1
        return SourceError(
            f"topic {topic}, partition {partition}, offset {self.offset}: the record cannot be decoded ({error}); what "
            f"lies before it is answered and committed; its batch, offsets {self.offset} to {end}, must be skipped: "
            f"stop the group's workers, kafka-consumer-groups.sh --bootstrap-server {config.bootstrap_servers} --group "
            f"{config.group_id} --topic {topic}:{partition} --reset-offsets --to-offset {self.next_batch} --execute, "
            "start"
        )
