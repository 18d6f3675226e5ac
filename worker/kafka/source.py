"""The events topic as a Source: polls of one member of a consumer group.

aiokafka blocks a poll while the group rebalances, whatever its timeout, so a fetch is a task that outlives the poll
that began it: nothing that was fetched is ever cancelled away.
"""

import asyncio
from collections.abc import Mapping

from aiokafka import TopicPartition, errors

from worker import logging
from worker.config import KafkaConfig
from worker.errors import SourceError
from worker.interfaces import Clock, Partition, PolledRecords, RebalanceListener
from worker.kafka.client import ensure_coordinator, ensure_topics, is_permanent, retry_at_start
from worker.kafka.consumer_group import GroupMember
from worker.kafka.corrupt_record import DECODE_ERRORS, CorruptRecord

log = logging.get("source")
POLL_GRACE_S = 0.05  # beyond a poll's timeout: only a rebalance takes longer
COMMIT_RETRY_S = 0.2
# Polled while paused: keeps the group's liveness and errors going, and what was fetched ahead stays in the buffer,
# where aiokafka's own pause would drop it and fetch up to 1 MiB a partition again. It holds for partitions that are
# assigned meanwhile, too.
NO_PARTITION = TopicPartition("", -1)
STALE_GENERATION = (errors.UnknownMemberIdError, errors.IllegalGenerationError, errors.RebalanceInProgressError)


class KafkaSource:
    """Implements Source. Starts from the earliest record where the group has no offset yet."""

    def __init__(self, config: KafkaConfig, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._pending_commit: dict[Partition, int] = {}  # next offsets whose commit is not yet acknowledged
        self._fetching: asyncio.Task[list[PolledRecords]] | None = None
        self._paused = False
        self._member_or_none: GroupMember | None = None
        self._corrupt: SourceError | None = None  # a record that cannot be decoded: the end of what can be read

    async def start(self, rebalance: RebalanceListener) -> None:
        """Returns when the group has assigned partitions. SourceError, SourceUnavailable, ConfigError."""
        await ensure_topics(self._config, self._clock, [self._config.events_topic])
        await ensure_coordinator(self._config, self._clock, self._config.group_id)

        async def join() -> GroupMember:
            group = GroupMember(self._config, rebalance)
            await group.join()
            return group

        self._member_or_none = await retry_at_start(self._config, self._clock, join)
        self._raise_failure()

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        """SourceError when the group or the topic refuses us; what may pass is waited out."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(timeout_s), name="fetch")
        done, _ = await asyncio.wait({self._fetching}, timeout=timeout_s + POLL_GRACE_S)
        self._raise_failure()
        if not done:
            return []
        task, self._fetching = self._fetching, None
        return task.result()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        """Repeats while the coordinator is away, at most `request_timeout_ms`; what is then still owed goes with the
        next commit. SourceError when it is refused."""
        owned = self._member.assignments
        self._pending_commit |= {
            p: offset for p, offset in offsets.items() if p in owned and owned[p] == assignments.get(p)
        }
        deadline_s = self._clock.monotonic() + self._config.request_timeout_ms / 1000
        # Shielded: of a request that is cut off on its way nobody knows what was committed.
        while not await asyncio.shield(self._commit_once()):
            if self._clock.monotonic() >= deadline_s:
                log.warning("the commit waits for the coordinator", offsets=_offsets_by_name(self._pending_commit))
                return
            await asyncio.sleep(COMMIT_RETRY_S)

    def lag(self) -> Mapping[Partition, int]:
        return {partition: self._member.lag(partition) for partition in self._member.assignments}

    @property
    def exhausted(self) -> bool:
        """A record cannot be decoded: what lies before it is still to be answered, then `stop` raises."""
        return self._corrupt is not None

    async def stop(self) -> None:
        """Commits what is owed and leaves the group. SourceError when a record could not be decoded."""
        await self._leave()
        if self._corrupt is not None:
            raise self._corrupt

    async def _leave(self) -> None:
        if self._member_or_none is None:
            return
        if self._pending_commit:
            await self.commit({}, {})
        await self._member_or_none.leave()
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    @property
    def _member(self) -> GroupMember:
        assert self._member_or_none is not None, "start() comes first"
        return self._member_or_none

    async def _fetch(self, timeout_s: float) -> list[PolledRecords]:
        """One getmany. Records get their epoch before anything else can run: no rebalance comes between."""
        consumer, only = self._member.consumer, (NO_PARTITION,) if self._paused else ()
        try:
            found = await consumer.getmany(
                *only, timeout_ms=int(timeout_s * 1000), max_records=self._config.max_poll_records
            )
        except errors.NoOffsetForPartitionError as error:
            await consumer.seek_to_beginning(error.args[0])
        except errors.OffsetOutOfRangeError as error:
            await self._rewind(error.args[0])
        except errors.ConsumerStoppedError:
            return []
        except DECODE_ERRORS as error:
            return await self._read_up_to(error)
        except errors.KafkaError as error:
            self._raise_unless_transient(error)
        else:
            return [self._to_polled(tp, records) for tp, records in found.items()]
        return []

    async def _read_up_to(self, error: Exception) -> list[PolledRecords]:
        """The partition's records before the one that cannot be decoded, which went down with it, one by one. What
        other partitions gave in that call is lost to this process, so it ends."""
        place, consumer, records = CorruptRecord.from_error(error), self._member.consumer, []
        try:
            while await consumer.position(place.tp) < place.offset:
                found = await consumer.getmany(place.tp, timeout_ms=1000, max_records=1)
                records += found.get(place.tp, [])
        except (*DECODE_ERRORS, errors.KafkaError) as ended:
            log.debug("read up to what cannot be decoded", error=repr(ended))
        self._corrupt = place.to_error(self._config, error)
        return [self._to_polled(place.tp, records)] if records else []

    def _to_polled(self, tp: TopicPartition, records: list) -> PolledRecords:
        partition, after_last = Partition(tp.topic, tp.partition), records[-1].offset + 1
        end_offset = max(self._member.consumer.highwater(tp) or 0, after_last)
        epoch = self._member.assignments.get(partition, -1)
        return PolledRecords(partition, epoch, end_offset, self._clock.now_ms(), self._clock.monotonic(), records)

    async def _rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        for tp, offset in offsets.items():
            log.error(
                "the next offset is not in the topic: events were deleted before they were read, or the topic was "
                "created anew; reading from its beginning",
                topic=tp.topic,
                partition=tp.partition,
                offset=offset,
            )
            await self._member.consumer.seek_to_beginning(tp)

    async def _commit_once(self) -> bool:
        """True when nothing is owed any more: acknowledged, or not ours to commit."""
        owed = {p: offset for p, offset in self._pending_commit.items() if p in self._member.assignments}
        try:
            if owed:
                await self._member.commit(owed)
        except STALE_GENERATION:
            log.info("not committed: the group has moved on", offsets=_offsets_by_name(owed))
        except errors.KafkaError as error:
            self._raise_unless_transient(error)
            return False
        # What was raised meanwhile stays owed, what is no longer ours does not.
        self._pending_commit = {
            p: o for p, o in self._pending_commit.items() if p in self._member.assignments and owed.get(p) != o
        }
        return not self._pending_commit

    def _raise_unless_transient(self, error: errors.KafkaError) -> None:
        if is_permanent(error) or not error.retriable:
            config = self._config
            where = f"kafka {config.bootstrap_servers}, topic {config.events_topic}, group {config.group_id}"
            raise SourceError(f"{where}: {error!r}; see the broker's log and kafka.* in the configuration") from error
        log.warning("repeated", error=repr(error))

    def _raise_failure(self) -> None:
        failure, self._member.failure = self._member.failure, None
        if failure is not None:
            raise failure


def _offsets_by_name(offsets: Mapping[Partition, int]) -> dict[str, int]:
    return {f"{topic}-{partition}": offset for (topic, partition), offset in sorted(offsets.items())}
