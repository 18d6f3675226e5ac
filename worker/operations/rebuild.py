"""Rings restored from the events topic: what Redis lost is read again, from each partition's beginning to where the
consumer group has committed; the worker itself reads on from there. No slates are sent.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, TopicPartition

from worker import logging
from worker.config import Config
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Clock, Partition, PolledRecords
from worker.kafka.client import client_options, ensure_coordinator, list_partitions, retry_at_start, with_admin
from worker.redis.client import RedisClient
from worker.redis.sequences import SequenceStore
from worker.stream.codec import Codec
from worker.stream.health import HealthState
from worker.stream.retry import Retry

log = logging.get("rebuild")
POLL_MS = 1000


@dataclass(slots=True)
class RebuildPlan:
    """Offsets to read, by partition: from the first, up to but not including the second."""

    spans: dict[TopicPartition, tuple[int, int]]
    lost: int = 0  # records that retention has taken: what rings held of them cannot come back

    @property
    def offsets(self) -> int:
        return sum(end - begin for begin, end in self.spans.values())


@dataclass(slots=True)
class RebuildReport:
    offsets: int = 0  # read so far; gaps (transaction markers) count
    events: int = 0
    unreadable: int = 0
    users: set[str] = field(default_factory=set)


class Rebuild:
    """One run. SourceError, SourceUnavailable; what Redis raises is retried while it may pass."""

    def __init__(self, config: Config, client: RedisClient, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._codec = Codec(config, clock)
        self._sequences = SequenceStore(client, config.sequences, rebuild=True)
        self._retry = Retry(config.redis.retry_backoff_s, HealthState(clock))

    async def run(
        self, force: bool, progress: Callable[[RebuildReport, int], None]
    ) -> tuple[RebuildPlan, RebuildReport]:
        """Refuses while the group has members, unless `force`: their pushes and ours would guard against each other.

        progress: called after every poll with what was done, and the number of offsets in all.
        """
        await ensure_coordinator(self._config.kafka, self._clock, self._config.kafka.group_id)
        if not force:
            await self._refuse_members()
        consumer = AIOKafkaConsumer(
            **client_options(self._config.kafka), enable_auto_commit=False, isolation_level="read_committed"
        )
        try:
            await retry_at_start(self._config.kafka, self._clock, consumer.start)
            plan, report = await self._plan(consumer), RebuildReport()
            async for fetched in self._read(consumer, plan):
                await self._push(fetched, report)
                report.offsets = sum([await _done(consumer, tp, span) for tp, span in plan.spans.items()])
                progress(report, plan.offsets)
            return plan, report
        finally:
            await consumer.stop()

    async def _refuse_members(self) -> None:
        kafka = self._config.kafka
        described = await with_admin(kafka, self._clock, lambda admin: admin.describe_consumer_groups([kafka.group_id]))
        if count := sum(len(group["members"]) for answer in described for group in answer.to_object()["groups"]):
            raise SourceError(
                f"group {kafka.group_id} has members that push to the same rings ({count}); stop them first "
                f"(or --force, when they are known to be dead)"
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
        begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        spans = {
            tp: (begins[tp], min(committed[tp].offset, ends[tp]))
            for tp in partitions
            if tp in committed and begins[tp] < min(committed[tp].offset, ends[tp])
        }
        return RebuildPlan(spans, sum(begins.values()))

    async def _read(self, consumer: AIOKafkaConsumer, plan: RebuildPlan) -> AsyncIterator[list[PolledRecords]]:
        """The plan's records in polls; a partition that is done is read no further."""
        left = dict(plan.spans)
        consumer.assign(list(left))
        for tp, (begin, _) in left.items():
            consumer.seek(tp, begin)
        heard_s = self._clock.monotonic()
        while left:
            polled = await consumer.getmany(*left, timeout_ms=POLL_MS, max_records=self._config.kafka.max_poll_records)
            if polled:
                heard_s = self._clock.monotonic()
                yield [self._to_polled(tp, records, left[tp][1]) for tp, records in polled.items()]
            elif self._clock.monotonic() - heard_s > self._config.kafka.request_timeout_ms / 1000:
                raise SourceUnavailable(f"kafka {self._config.kafka.bootstrap_servers} sends no more; run it again")
            left = {tp: span for tp, span in left.items() if await consumer.position(tp) < span[1]}

    def _to_polled(self, tp: TopicPartition, records: list, end: int) -> PolledRecords:
        wanted = [record for record in records if record.offset < end]
        return PolledRecords(
            Partition(tp.topic, tp.partition), 0, end, self._clock.now_ms(), self._clock.monotonic(), wanted
        )

    async def _push(self, fetched: list[PolledRecords], report: RebuildReport) -> None:
        arrivals, letters = self._codec.decode_all(fetched)
        if arrivals:
            await self._retry(self._sequences.push, arrivals)
        report.events += len(arrivals)
        report.unreadable += len(letters)
        report.users.update(consumed.event.user_id for consumed in arrivals)


async def _done(consumer: AIOKafkaConsumer, tp: TopicPartition, span: tuple[int, int]) -> int:
    return min(await consumer.position(tp), span[1]) - span[0]
