"""The events topic as a Source: polls of one consumer group member.

aiokafka blocks a poll while the group rebalances, whatever its timeout, so each fetch is a task that may outlive its
poll; fetched records are never lost to cancellation.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from aiokafka import TopicPartition, errors

from worker import logging
from worker.config import KafkaConfig
from worker.deadline import Deadline
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Clock, Partition, PolledRecords, RebalanceListener
from worker.kafka.client import ensure_coordinator, ensure_topics, raise_unless_transient, retry_at_start, source_error
from worker.kafka.consumer_group import NO_PARTITION, STOP_S, GroupMember
from worker.kafka.corrupt_record import CorruptRecord, read_before
from worker.kafka.offset_commits import OffsetCommits
from worker.kafka.offset_reset import seek_into_range, seek_to_start
from worker.kafka.partition_progress import PartitionProgress
from worker.kafka.records import use_fast_records
from worker.kafka.topic_id import TopicIdentity, read_topic_id

log = logging.get("source")
POLL_GRACE_S = 0.05  # beyond a poll's timeout: only a rebalance takes longer
ASK_ENDS_S = 5.0  # between two questions for the partitions' ends, one small request per broker
TOPIC_CHECK_S = 1.0  # without a request for the topic's id, as each commit makes one

ClaimTopic = Callable[[str, str], Awaitable[None]]


async def ignore_topic_id(topic: str, topic_id: str) -> None:
    pass


class KafkaSource:
    """Implements Source. Starts from the earliest record where the group has no offset yet."""

    def __init__(
        self,
        config: KafkaConfig,
        clock: Clock,
        claim_topic: ClaimTopic = ignore_topic_id,
        deadline: Deadline | None = None,
    ) -> None:
        """Join nothing yet.

        claim_topic: called once with the topic's name and id; raises TopicRecreated if the rings are another's
        deadline: of the way out; without one the last commit and leaving take up to their own time limits
        """
        self._claim_topic = claim_topic
        self._config = config
        self._clock = clock
        self._deadline = deadline or Deadline(clock)
        self._fetching: asyncio.Task[list[PolledRecords]] | None = None
        self._paused = False
        self._progress = PartitionProgress(clock)
        self._asking: asyncio.Task[None] | None = None
        self._ask_ends_s = 0.0  # by Clock.monotonic(): when the partitions' ends are due to be asked for
        self._member_or_none: GroupMember | None = None
        self._commits_or_none: OffsetCommits | None = None
        self._corrupt: SourceError | None = None  # set at a record that cannot be decoded: nothing after it is read

    async def start(self, rebalance: RebalanceListener) -> None:
        """Return when the group has assigned partitions.

        Raises SourceError, SourceUnavailable, ConfigError, and TopicRecreated.
        """
        use_fast_records()
        topic = self._config.events_topic
        await ensure_topics(self._config, self._clock, [topic])
        identity = TopicIdentity(topic, await read_topic_id(self._config, self._clock, topic))
        if identity.topic_id is not None:
            await self._claim_topic(topic, identity.topic_id)
        else:
            log.warning("the broker tells no topic ids: a topic that is created again may not be noticed", topic=topic)
        await ensure_coordinator(self._config, self._clock, self._config.group_id)

        async def join() -> GroupMember:
            member = GroupMember(self._config, rebalance, self._clock, identity, self._deadline)
            await member.join()
            return member

        self._member_or_none = await retry_at_start(self._config, self._clock, join)
        self._commits_or_none = OffsetCommits(self._config, self._member, self._clock, self._deadline)
        self._raise_failure()

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        """Return new records; transient errors are waited out.

        Raises SourceError when the group or the topic refuses this client, and what a rebalance callback raised.
        """
        self._ask_ends_if_due()
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(timeout_s), name="fetch")
        done, _ = await asyncio.wait({self._fetching}, timeout=timeout_s + POLL_GRACE_S)
        self._raise_failure()
        if not done:
            return []
        task = self._fetching
        self._fetching = None
        return task.result()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        """Commit the next offsets, skipping partitions from an older assignment.

        Retries while the coordinator is unavailable, at most `request_timeout_ms`; offsets still pending then go with
        the next commit, unless their assignment has passed. Raises SourceError when the commit is refused,
        TopicRecreated.
        """
        await self._commits.commit(offsets, assignments)

    def uncommitted(self) -> dict[Partition, int]:
        """Return the offsets to commit, dropping those of a passed assignment: another member may be further by now."""
        return self._commits.uncommitted()

    def lag(self) -> Mapping[Partition, int]:
        """Return records after the last polled one, as of the last fetch or the broker's last answer."""
        positions = self._member.positions()
        waiting = {partition: self._progress.end(partition) - position for partition, position in positions.items()}
        return {
            partition: max(self._member.lag(partition), waiting.get(partition, 0))
            for partition in self._member.assignments
        }

    def stalled_s(self) -> Mapping[Partition, float]:
        """See Source."""
        return self._progress.stalled_s()

    async def end_of(self, partition: Partition) -> int:
        """Ask the broker where a partition ends for a reader of committed records. SourceError, SourceUnavailable."""
        tp = TopicPartition(*partition)
        try:
            return (await self._member.consumer.end_offsets([tp]))[tp]
        except errors.KafkaError as error:
            raise source_error(self._config, partition.topic, error) from error

    def problem(self) -> str:
        """See Source."""
        if self._member_or_none is not None and self._member_or_none.is_topic_missing:
            return f"topic {self._config.events_topic} is not on {self._config.bootstrap_servers}: it was deleted"
        return ""

    @property
    def exhausted(self) -> bool:
        """Whether a record cannot be decoded: the worker answers the records before it, then `stop` raises."""
        return self._corrupt is not None

    async def stop(self) -> None:
        """Leave the group. Raises SourceError when a record could not be decoded."""
        await self._leave()
        if self._corrupt is not None:
            raise self._corrupt

    async def _leave(self) -> None:
        if self._member_or_none is None:
            return
        await self._member_or_none.leave()
        committing = self._commits_or_none and self._commits_or_none.running
        running = [task for task in (self._fetching, committing, self._asking) if task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=self._deadline.share_s(STOP_S))

    @property
    def _member(self) -> GroupMember:
        assert self._member_or_none is not None, "start() comes first"
        return self._member_or_none

    @property
    def _commits(self) -> OffsetCommits:
        assert self._commits_or_none is not None, "start() comes first"
        return self._commits_or_none

    async def _fetch(self, timeout_s: float) -> list[PolledRecords]:
        """Call getmany once. Records get their assignment before another task runs: no rebalance comes between."""
        consumer = self._member.consumer
        # While paused the member stays live and its errors are raised, and prefetched records stay in the buffer.
        # aiokafka's own pause would drop them and fetch up to 1 MiB per partition again. Partitions that are assigned
        # during the pause are not polled either.
        partitions = (NO_PARTITION,) if self._paused else ()
        try:
            await self._check_topic_if_due()
            fetched = await consumer.getmany(
                *partitions, timeout_ms=int(timeout_s * 1000), max_records=self._config.max_poll_records
            )
        except (errors.NoOffsetForPartitionError, errors.OffsetOutOfRangeError) as error:
            await self._reset_position(error)
        except errors.ConsumerStoppedError:
            return []
        except Exception as error:
            if (corrupt := CorruptRecord.find(error)) is not None:
                return await self._read_up_to(corrupt, error)
            if not isinstance(error, errors.KafkaError):
                raise
            self._raise_unless_transient(error)
        else:
            return [self._to_polled(tp, records) for tp, records in fetched.items()]
        return []

    def _ask_ends_if_due(self) -> None:
        """Ask for the partitions' ends in a task of its own, one at a time."""
        if self._clock.monotonic() >= self._ask_ends_s and (self._asking is None or self._asking.done()):
            self._ask_ends_s = self._clock.monotonic() + ASK_ENDS_S
            self._asking = asyncio.create_task(self._ask_ends(), name="ask ends")

    async def _ask_ends(self) -> None:
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000):
                ends = await self._member.ends()
        except (errors.KafkaError, TimeoutError) as error:
            log.debug("the partitions' ends are not known", error=repr(error))
        else:
            self._progress.update(self._member.positions(), ends, self._paused)

    async def _check_topic_if_due(self) -> None:
        """Notice a topic that was created again while this member has no partition of it, or nothing to commit."""
        if self._clock.monotonic() >= self._member.topic_checked_s + TOPIC_CHECK_S:
            await self._member.check_topic()

    async def _read_up_to(self, corrupt: CorruptRecord, error: Exception) -> list[PolledRecords]:
        """Return the partition's records before the corrupt one, which were lost in the same call, read again.

        Records of other partitions are lost too, so the process stops. Raises SourceUnavailable.
        """
        try:
            records = await read_before(self._member.consumer, corrupt, self._config.request_timeout_ms / 1000)
        except (errors.KafkaError, TimeoutError) as failed:
            raise SourceUnavailable(
                f"topic {corrupt.tp.topic}, partition {corrupt.tp.partition}, offset {corrupt.offset}: the record "
                f"cannot be decoded, and reading those before it failed ({failed!r}); start again"
            ) from error
        self._corrupt = corrupt.to_error(self._config, error)
        return [self._to_polled(corrupt.tp, records)] if records else []

    def _to_polled(self, tp: TopicPartition, records: list) -> PolledRecords:
        partition = Partition(tp.topic, tp.partition)
        after_last = records[-1].offset + 1
        return PolledRecords(
            partition,
            assignment=self._member.assignments.get(partition, -1),
            end_offset=max(self._member.consumer.highwater(tp) or 0, after_last),
            polled_ms=self._clock.now_ms(),
            polled_s=self._clock.monotonic(),
            records=records,
        )

    async def _reset_position(self, error: errors.NoOffsetForPartitionError | errors.OffsetOutOfRangeError) -> None:
        """Raises TopicRecreated, SourceError."""
        try:
            if isinstance(error, errors.NoOffsetForPartitionError):
                await seek_to_start(self._member, error.args[0], self._config)
                return
            await self._member.check_topic()
            for tp, offset in error.args[0].items():
                await seek_into_range(self._member, tp, offset, self._config)
        except errors.KafkaError as failed:  # the next fetch finds the same position missing
            self._raise_unless_transient(failed)

    def _raise_unless_transient(self, error: errors.KafkaError) -> None:
        raise_unless_transient(self._config, error, self._config.events_topic)

    def _raise_failure(self) -> None:
        failure = self._member.failure
        self._member.failure = None
        if failure is not None:
            raise failure
