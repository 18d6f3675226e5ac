"""Restore the users' rings from the events topic after Redis lost them.

Each partition is read from its beginning to the consumer group's committed offset; the workers continue from there. No
slates are sent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from worker import logging
from worker.config import Config
from worker.errors import SourceError
from worker.interfaces import Clock, Partition, PolledRecords
from worker.kafka.client import ensure_coordinator, list_partitions, retry_at_start, with_admin
from worker.kafka.topic_reader import OffsetRange, make_consumer, offset_ranges, read_ranges
from worker.redis.client import RedisClient
from worker.redis.sequences import SequenceStore
from worker.stream.codec import Codec
from worker.stream.health import HealthState
from worker.stream.retry import Retry

log = logging.get("rebuild")


@dataclass(slots=True)
class RebuildPlan:
    """The offsets to read."""

    ranges: dict[TopicPartition, OffsetRange]
    lost: int = 0  # records that retention has deleted: their events cannot be restored

    @property
    def offsets(self) -> int:
        return sum(end - begin for begin, end in self.ranges.values())


@dataclass(slots=True)
class RebuildReport:
    """The counts of a rebuild, so far."""

    offsets: int = 0  # read so far, including gaps (transaction markers)
    events: int = 0
    unreadable: int = 0
    users: set[str] = field(default_factory=set)


class Rebuild:
    """One rebuild. Retries pushes to Redis until they succeed or fail permanently."""

    def __init__(self, config: Config, client: RedisClient, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._codec = Codec(config, clock)
        self._sequences = SequenceStore(client, config.sequences, rebuild=True)
        self._retry = Retry(config.redis.retry_backoff_s, HealthState(clock))

    async def run(
        self, force: bool, progress: Callable[[RebuildReport, int], None]
    ) -> tuple[RebuildPlan, RebuildReport]:
        """Read the planned offsets and push their events.

        force: even while the group has members, whose pushes would conflict with these
        progress: called after every poll with the report so far and the total number of offsets
        Raises SourceError, SourceUnavailable, StoreError.
        """
        await ensure_coordinator(self._config.kafka, self._clock, self._config.kafka.group_id)
        if not force:
            await self._check_no_members()
        consumer = make_consumer(self._config.kafka)
        try:
            await retry_at_start(self._config.kafka, self._clock, consumer.start)
            plan = await self._plan(consumer)
            report = RebuildReport()
            consumer.assign(list(plan.ranges))
            async for polled in read_ranges(consumer, plan.ranges, self._config.kafka, self._clock):
                await self._push(self._to_polled(polled, plan), report)
                report.offsets = sum([await _offsets_read(consumer, *item) for item in plan.ranges.items()])
                progress(report, plan.offsets)
            return plan, report
        finally:
            await consumer.stop()

    async def _check_no_members(self) -> None:
        kafka = self._config.kafka
        responses = await with_admin(kafka, self._clock, lambda admin: admin.describe_consumer_groups([kafka.group_id]))
        if count := sum(len(group["members"]) for each in responses for group in each.to_object()["groups"]):
            raise SourceError(
                f"group {kafka.group_id} has members that push to the same rings ({count}); stop them first "
                f"(or use --force when they are dead)"
            )

    async def _plan(self, consumer: AIOKafkaConsumer) -> RebuildPlan:
        kafka = self._config.kafka
        if not (partitions := await list_partitions(kafka, self._clock, kafka.events_topic)):
            raise SourceError(
                f"topic {kafka.events_topic} is not on {kafka.bootstrap_servers}: nothing to rebuild from"
            )
        committed = await with_admin(
            kafka, self._clock, lambda admin: admin.list_consumer_group_offsets(kafka.group_id)
        )
        offsets = await offset_ranges(consumer, partitions, kafka)
        ranges = {
            each: OffsetRange(begin, min(committed[each].offset, end))
            for each, (begin, end) in offsets.items()
            if each in committed and begin < min(committed[each].offset, end)
        }
        return RebuildPlan(ranges, sum(begin for begin, _ in offsets.values()))

    def _to_polled(
        self, polled: Mapping[TopicPartition, list[ConsumerRecord]], plan: RebuildPlan
    ) -> list[PolledRecords]:
        """Return the planned ones of the records that one poll returned."""
        return [
            PolledRecords(
                partition=Partition(*tp),
                assignment=0,
                end_offset=plan.ranges[tp].end,
                polled_ms=self._clock.now_ms(),
                polled_s=self._clock.monotonic(),
                records=[record for record in records if record.offset < plan.ranges[tp].end],
            )
            for tp, records in polled.items()
        ]

    async def _push(self, polled: list[PolledRecords], report: RebuildReport) -> None:
        events, dead_letters = self._codec.decode_all(polled)
        if events:
            await self._retry(self._sequences.push, events)
        report.events += len(events)
        report.unreadable += len(dead_letters)
        report.users.update(consumed.event.user_id for consumed in events)


async def _offsets_read(consumer: AIOKafkaConsumer, partition: TopicPartition, offsets: OffsetRange) -> int:
    return min(await consumer.position(partition), offsets.end) - offsets.begin
