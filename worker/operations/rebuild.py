"""Restore the users' rings from the events topic after Redis lost some or all of them.

Each partition is read to its end. Events before the consumer group's committed offset are restored; those after it are
only compared with the rings, because the workers will read them. No slates are sent. Rings that Redis still holds whole
stay as they are.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from worker.config import Config
from worker.errors import SourceError
from worker.interfaces import Clock, ConsumedEvent, Partition, PolledRecords
from worker.kafka.client import ensure_coordinator, list_partitions, retry_at_start, stop_client, with_admin
from worker.kafka.corrupt_record import CorruptRecord
from worker.kafka.topic_id import TopicIdentity, read_topic_id
from worker.kafka.topic_reader import (
    OffsetRange,
    begin_offsets,
    log_corrupt,
    make_consumer,
    offset_ranges,
    positions_of,
    read_ranges,
)
from worker.operations.group_fence import GroupFence
from worker.operations.ring_restorer import RingRestorer
from worker.redis.client import RedisClient
from worker.redis.rings.sequences import SequenceStore
from worker.stream.codec import Codec

OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class RebuildPlan:
    """The offsets to read."""

    ranges: dict[TopicPartition, OffsetRange]
    committed: dict[TopicPartition, int]  # the offset from which the workers continue
    lost: int = 0  # records that retention has deleted: their events cannot be restored

    @property
    def offsets(self) -> int:
        return sum(end - begin for begin, end in self.ranges.values())


@dataclass(slots=True)
class RebuildReport:
    """The counts of a rebuild."""

    offsets: int = 0  # read, including gaps (transaction markers)
    events: int = 0
    unreadable: int = 0  # records whose value is no event
    corrupt: int = 0  # offsets of batches that Kafka's client cannot decode, from the first such record on
    users: int = 0
    restored: int = 0  # events that rings did not have
    rewritten: int = 0  # rings that lacked events before others that they had
    lost: int = 0  # records that retention deleted before they were read


class Rebuild:
    """One rebuild."""

    def __init__(self, config: Config, client: RedisClient, clock: Clock) -> None:
        self._config = config
        self._client = client
        self._clock = clock
        self._codec = Codec(config, clock)
        self._fence: GroupFence | None = None

    async def run(self, force: bool, on_progress: OnProgress) -> tuple[RebuildPlan, RebuildReport]:
        """Restore the rings while this process owns all partitions of the group.

        force: without joining the group, even while it has members, whose pushes would conflict with these
        on_progress: called after every poll with the number of offsets read so far and to read in total
        Raises SourceError, also when a worker joins the group, SourceUnavailable, StoreError, TopicRecreated.
        """
        kafka = self._config.kafka
        if not (partitions := await list_partitions(kafka, self._clock, kafka.events_topic)):
            raise SourceError(
                f"topic {kafka.events_topic} is not on {kafka.bootstrap_servers}: nothing to rebuild from"
            )
        identity = TopicIdentity(kafka.events_topic, await read_topic_id(kafka, self._clock, kafka.events_topic))
        if identity.topic_id is not None:
            await SequenceStore(self._client, self._config.sequences).claim_topic(identity.topic, identity.topic_id)
        await ensure_coordinator(kafka, self._clock, kafka.group_id)
        async with AsyncExitStack() as stack:
            if not force:
                self._fence = await stack.enter_async_context(GroupFence(kafka, self._clock, partitions))
            consumer = make_consumer(kafka)
            stack.push_async_callback(stop_client, consumer, self._clock)
            await retry_at_start(kafka, self._clock, consumer.start)
            plan = await self._plan(consumer, partitions, identity)
            return plan, await self._restore(consumer, plan, on_progress)

    async def _restore(self, consumer: AIOKafkaConsumer, plan: RebuildPlan, on_progress: OnProgress) -> RebuildReport:
        report = RebuildReport()
        committed = {Partition(*tp): offset for tp, offset in plan.committed.items()}
        rings = RingRestorer(self._config, self._client, self._clock, committed, self._fence)
        consumer.assign(list(plan.ranges))
        async for events, unreadable in self._read(consumer, plan, report):
            report.events += len(events)
            report.unreadable += unreadable
            report.restored += await rings.restore(events)
            report.offsets = await self._offsets_read(consumer, plan)
            on_progress(report.offsets, plan.offsets)
        report.users = rings.user_count
        passes = rings.passes()
        for number, users in enumerate(passes, 1):
            await rings.start_pass(users)
            again = RebuildReport()  # the same records may be missing again
            async for events, _ in self._read(consumer, plan, again):
                await rings.collect(events)
                read = number * plan.offsets + await self._offsets_read(consumer, plan)
                on_progress(read, (1 + len(passes)) * plan.offsets)
            report.restored += await rings.finish_pass()
            report.rewritten += len(users)
            report.lost = max(report.lost, again.lost)
        return report

    async def _plan(
        self, consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], identity: TopicIdentity
    ) -> RebuildPlan:
        kafka = self._config.kafka
        stored = await with_admin(kafka, self._clock, lambda admin: admin.list_consumer_group_offsets(kafka.group_id))
        offsets = await offset_ranges(consumer, partitions, kafka)
        owned = {tp: each.offset for tp, each in stored.items() if identity.owns_commit(each.metadata)}
        committed = {tp: owned.get(tp, offsets[tp].begin) for tp in partitions}
        return RebuildPlan(offsets, committed, lost=sum(begin for begin, _ in offsets.values()))

    async def _read(
        self, consumer: AIOKafkaConsumer, plan: RebuildPlan, report: RebuildReport
    ) -> AsyncIterator[tuple[list[ConsumedEvent], int]]:
        """Yield the events and the number of invalid records of each poll. Counts `report.lost` and `corrupt`."""

        def skip(corrupt: CorruptRecord, error: Exception) -> None:
            report.corrupt += corrupt.next_batch - corrupt.offset
            log_corrupt(corrupt, error)

        expected = {each: offsets.begin for each, offsets in plan.ranges.items()}
        async for polled in read_ranges(consumer, plan.ranges, self._config.kafka, self._clock, skip):
            positions = await positions_of(consumer, plan.ranges, self._config.kafka)
            report.lost += await self._count_deleted(consumer, plan, expected, positions, polled)
            expected = positions
            events, dead_letters = self._codec.decode_all(self._to_polled(polled, plan))
            yield events, len(dead_letters)
            if self._fence is not None:
                await self._fence.keep_alive()

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

    async def _offsets_read(self, consumer: AIOKafkaConsumer, plan: RebuildPlan) -> int:
        positions = await positions_of(consumer, plan.ranges, self._config.kafka)
        return sum(min(positions[each], offsets.end) - offsets.begin for each, offsets in plan.ranges.items())

    async def _count_deleted(
        self,
        consumer: AIOKafkaConsumer,
        plan: RebuildPlan,
        expected: Mapping[TopicPartition, int],
        positions: Mapping[TopicPartition, int],
        polled: Mapping[TopicPartition, list[ConsumerRecord]],
    ) -> int:
        """Return how many planned records a poll has jumped over because retention had deleted them.

        expected, positions: the next offset of each partition before and after the poll
        """
        arrived = {
            tp: min(polled[tp][0].offset if polled.get(tp) else positions[tp], plan.ranges[tp].end) for tp in expected
        }
        jumped = [tp for tp, offset in arrived.items() if offset > expected[tp]]
        if not jumped:
            return 0
        begins = await begin_offsets(consumer, jumped, self._config.kafka)  # other gaps are transaction markers
        return sum(max(0, min(begins[tp], arrived[tp]) - expected[tp]) for tp in jumped)
