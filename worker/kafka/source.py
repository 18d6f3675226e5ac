"""The events topic as a Source: polls of one member of a consumer group.

aiokafka blocks a poll while the group rebalances, whatever its timeout, so a fetch is a task that outlives the poll
that began it: nothing that was fetched is ever cancelled away.
"""

import asyncio
from collections.abc import Mapping

from aiokafka import TopicPartition, errors

from worker import logging
from worker.config import Kafka
from worker.errors import SourceError
from worker.interfaces import Clock, Fetched, Partition, Rebalance
from worker.kafka.client import at_start, ensure_coordinator, ensure_topics, refused
from worker.kafka.consumer_group import Group
from worker.kafka.corrupt_record import UNDECODABLE, Place

log = logging.get("source")
GRACE_S = 0.05  # beyond a poll's timeout: only a rebalance takes longer
COMMIT_RETRY_S = 0.2
# Polled while paused: keeps the group's liveness and errors going, and what was fetched ahead stays in the buffer,
# where aiokafka's own pause would drop it and fetch up to 1 MiB a partition again. It holds for partitions that are
# assigned meanwhile, too.
NOBODY = TopicPartition("", -1)
MOVED_ON = (errors.UnknownMemberIdError, errors.IllegalGenerationError, errors.RebalanceInProgressError)


class KafkaSource:
    """Implements Source. Starts from the earliest record where the group has no offset yet."""

    def __init__(self, config: Kafka, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._owed: dict[Partition, int] = {}  # next offsets whose commit is not yet acknowledged
        self._fetching: asyncio.Task[list[Fetched]] | None = None
        self._paused = False
        self._joined: Group | None = None
        self._broken: SourceError | None = None  # a record that cannot be decoded: the end of what can be read

    async def start(self, rebalance: Rebalance) -> None:
        """Returns when the group has assigned partitions. SourceError, SourceUnavailable, ConfigError."""
        await ensure_topics(self._config, self._clock, [self._config.events_topic])
        await ensure_coordinator(self._config, self._clock, self._config.group)

        async def join() -> Group:
            group = Group(self._config, rebalance)
            await group.join()
            return group

        self._joined = await at_start(self._config, self._clock, join)
        self._raise_failure()

    async def poll(self, timeout_s: float) -> list[Fetched]:
        """SourceError when the group or the topic refuses us; what may pass is waited out."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(timeout_s), name="fetch")
        done, _ = await asyncio.wait({self._fetching}, timeout=timeout_s + GRACE_S)
        self._raise_failure()
        if not done:
            return []
        task, self._fetching = self._fetching, None
        return task.result()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    async def commit(self, frontiers: Mapping[Partition, int], epochs: Mapping[Partition, int]) -> None:
        """Repeats while the coordinator is away, at most `request_timeout_ms`; what is then still owed goes with the
        next commit. SourceError when it is refused."""
        owned = self._group.epochs
        self._owed |= {p: offset for p, offset in frontiers.items() if p in owned and owned[p] == epochs.get(p)}
        deadline_s = self._clock.monotonic() + self._config.request_timeout_ms / 1000
        # Shielded: of a request that is cut off on its way nobody knows what was committed.
        while not await asyncio.shield(self._commit_once()):
            if self._clock.monotonic() >= deadline_s:
                log.warning("the commit waits for the coordinator", offsets=_named(self._owed))
                return
            await asyncio.sleep(COMMIT_RETRY_S)

    def lag(self) -> Mapping[Partition, int]:
        return {partition: self._group.behind(partition) for partition in self._group.epochs}

    @property
    def exhausted(self) -> bool:
        """A record cannot be decoded: what lies before it is still to be answered, then `stop` raises."""
        return self._broken is not None

    async def stop(self) -> None:
        """Commits what is owed and leaves the group. SourceError when a record could not be decoded."""
        await self._leave()
        if self._broken is not None:
            raise self._broken

    async def _leave(self) -> None:
        if self._joined is None:
            return
        if self._owed:
            await self.commit({}, {})
        await self._joined.leave()
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})

    @property
    def _group(self) -> Group:
        assert self._joined is not None, "start() comes first"
        return self._joined

    async def _fetch(self, timeout_s: float) -> list[Fetched]:
        """One getmany. Records get their epoch before anything else can run: no rebalance comes between."""
        consumer, only = self._group.consumer, (NOBODY,) if self._paused else ()
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
        except UNDECODABLE as error:
            return await self._before(error)
        except errors.KafkaError as error:
            self._wait_out(error)
        else:
            return [self._share(tp, records) for tp, records in found.items()]
        return []

    async def _before(self, error: Exception) -> list[Fetched]:
        """The partition's records before the one that cannot be decoded, which went down with it, one by one. What
        other partitions gave in that call is lost to this process, so it ends."""
        place, consumer, records = Place.of(error), self._group.consumer, []
        try:
            while await consumer.position(place.tp) < place.offset:
                found = await consumer.getmany(place.tp, timeout_ms=1000, max_records=1)
                records += found.get(place.tp, [])
        except (*UNDECODABLE, errors.KafkaError) as ended:
            log.debug("read up to what cannot be decoded", error=repr(ended))
        self._broken = place.halted(self._config, error)
        return [self._share(place.tp, records)] if records else []

    def _share(self, tp: TopicPartition, records: list) -> Fetched:
        partition, after_last = Partition(tp.topic, tp.partition), records[-1].offset + 1
        end_offset = max(self._group.consumer.highwater(tp) or 0, after_last)
        epoch = self._group.epochs.get(partition, -1)
        return Fetched(partition, epoch, end_offset, self._clock.now_ms(), self._clock.monotonic(), records)

    async def _rewind(self, offsets: Mapping[TopicPartition, int]) -> None:
        for tp, offset in offsets.items():
            log.error(
                "the next offset is not in the topic: events were deleted before they were read, or the topic was "
                "created anew; reading from its beginning",
                topic=tp.topic,
                partition=tp.partition,
                offset=offset,
            )
            await self._group.consumer.seek_to_beginning(tp)

    async def _commit_once(self) -> bool:
        """True when nothing is owed any more: acknowledged, or not ours to commit."""
        owed = {p: offset for p, offset in self._owed.items() if p in self._group.epochs}
        try:
            if owed:
                await self._group.commit(owed)
        except MOVED_ON:
            log.info("not committed: the group has moved on", offsets=_named(owed))
        except errors.KafkaError as error:
            self._wait_out(error)
            return False
        # What was raised meanwhile stays owed, what is no longer ours does not.
        self._owed = {p: o for p, o in self._owed.items() if p in self._group.epochs and owed.get(p) != o}
        return not self._owed

    def _wait_out(self, error: errors.KafkaError) -> None:
        if refused(error) or not error.retriable:
            where = f"kafka {self._config.bootstrap}, topic {self._config.events_topic}, group {self._config.group}"
            raise SourceError(f"{where}: {error!r}; see the broker's log and kafka.* in the configuration") from error
        log.warning("repeated", error=repr(error))

    def _raise_failure(self) -> None:
        failure, self._group.failure = self._group.failure, None
        if failure is not None:
            raise failure


def _named(offsets: Mapping[Partition, int]) -> dict[str, int]:
    return {f"{topic}-{partition}": offset for (topic, partition), offset in sorted(offsets.items())}
