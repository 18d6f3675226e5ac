"""This process's membership in the consumer group, built on aiokafka: numbered assignments and fenced commits.

aiokafka logs and swallows the exceptions of rebalance listeners, so they are kept here and raised by the next poll.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from worker import logging
from worker.config import KafkaConfig
from worker.deadline import Deadline
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Clock, Partition, RebalanceListener
from worker.kafka.client import METADATA_POLL_S, client_options, is_transient
from worker.kafka.error_causes import FENCED_INSTANCE, describe
from worker.kafka.static_membership import is_instance_taken
from worker.kafka.topic_id import TopicIdentity, fetch_topic_id

log = logging.get("group")
STOP_S = 10.0
NO_PARTITION = TopicPartition("", -1)  # polled to stay a member of the group without taking records


class GroupMember:
    """One member of the group.

    Reads committed records only. `consumer.getmany` raises when a position is missing or out of range.
    """

    def __init__(
        self,
        config: KafkaConfig,
        listener: RebalanceListener,
        clock: Clock,
        identity: TopicIdentity | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """identity: of the events topic, where it is known already; deadline: of the way out."""
        self._config = config
        self._identity = identity or TopicIdentity(config.events_topic)
        self._listener = listener
        self._clock = clock
        self._deadline = deadline or Deadline(clock)
        self._generation = -1  # the group's generation when the partitions were assigned
        self._assignment_count = 0  # numbers the assignments
        self.assignments: dict[Partition, int] = {}
        self.is_topic_missing = False  # deleted, when its id was last asked for
        self.topic_checked_s = -math.inf  # by Clock.monotonic(): when that was
        self.failure: Exception | None = None  # raised by a rebalance callback, not yet re-raised
        self.was_assigned = asyncio.Event()  # the first assignment's callback has ended
        # A join waits until the other members have drained.
        timeout_ms = max(config.request_timeout_ms, config.rebalance_timeout_ms + 5000)
        options: dict[str, Any] = client_options(config) | {"request_timeout_ms": timeout_ms}
        self.consumer = AIOKafkaConsumer(
            **options,
            group_id=config.group_id,
            group_instance_id=config.group_instance_id,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            session_timeout_ms=config.session_timeout_ms,
            heartbeat_interval_ms=min(1000, config.session_timeout_ms // 3),  # how soon a rebalance is noticed
            rebalance_timeout_ms=config.rebalance_timeout_ms,
            metadata_max_age_ms=config.metadata_max_age_ms,
        )

    async def join(self) -> None:
        """Return when partitions are assigned. The caller sets the deadline."""
        self.consumer.subscribe([self._config.events_topic], listener=_ListenerAdapter(self))
        try:
            await self.consumer.start()
            await self.was_assigned.wait()  # start() does not wait for the callback
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Stop within STOP_S. A static member stays in the group until its session times out."""
        if not await self._deadline.finish(self.consumer.stop(), STOP_S):
            log.warning("leaving the group failed: it waits for the session timeout", group=self._config.group_id)

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit once, without a retry, and with the topic's id.

        Raises KafkaError; IllegalGenerationError when the generation is stale, whichever side notices it;
        TopicRecreated, because the offsets are of another topic.
        """
        await self.check_topic()
        # NOTE: private in aiokafka 0.14: the coordinator's `_commit_lock` and `_do_commit_offsets`. Once the broker has
        # forgotten a member, its commits go out without a generation and might move offsets back, so the generation is
        # compared here. The public `commit()` retries internally, and may have lost the generation by then;
        # `_do_commit_offsets` builds its request before its first await, so this comparison holds for it.
        coordinator = self._coordinator
        metadata = self._identity.commit_metadata
        to_commit = {TopicPartition(*each): OffsetAndMetadata(offset, metadata) for each, offset in offsets.items()}
        async with coordinator._commit_lock:
            if not self.is_current:
                raise errors.IllegalGenerationError(self._config.group_id)
            await coordinator._do_commit_offsets(self._assignment, to_commit)

    async def check_topic(self) -> None:
        """Raise TopicRecreated if the topic is no longer the one that this process read. Raises KafkaError."""
        # NOTE: private in aiokafka 0.14: the consumer's `_client`, whose connections are open already.
        self.topic_checked_s = self._clock.monotonic()
        topic_id = await fetch_topic_id(self.consumer._client, self._config.events_topic)
        self._identity.check(topic_id)
        self.is_topic_missing = topic_id is None and self._identity.topic_id is not None

    @property
    def is_current(self) -> bool:
        """Whether the group's generation is still the one in which the partitions were assigned."""
        return self._coordinator.generation == self._generation

    async def ends(self) -> dict[Partition, int]:
        """Ask the broker where each assigned partition ends for a reader of committed records. Raises KafkaError."""
        partitions = [TopicPartition(*partition) for partition in self.assignments]
        ends = await self.consumer.end_offsets(partitions) if partitions else {}
        return {Partition(tp.topic, tp.partition): end for tp, end in ends.items()}

    def positions(self) -> dict[Partition, int]:
        """Return the next offset to poll of each assigned partition whose position is known."""
        found = {partition: self._position(TopicPartition(*partition)) for partition in self.assignments}
        return {partition: position for partition, position in found.items() if position is not None}

    def lag(self, partition: Partition) -> int:
        """Return the number of readable records after the last polled one, as of the last fetch.

        Transaction markers and everything after the start of an open transaction are not readable.
        """
        tp = TopicPartition(*partition)
        position = self._position(tp)
        if position is None:
            return 0
        end = self.consumer.highwater(tp)
        stable_end = self.consumer.last_stable_offset(tp)
        readable = end if stable_end is None or stable_end < 0 else stable_end
        return max(0, (readable or 0) - position)

    def _position(self, tp: TopicPartition) -> int | None:
        """Return the next offset to poll; None when the partition is not assigned or the offset not known yet."""
        # NOTE: the public `position()` waits for a missing position, its state in the private assignment does not.
        assignment = self._assignment
        state = assignment and assignment.state_value(tp)
        return state.position if state is not None and state.has_valid_position else None

    @property
    def _assignment(self) -> Any:
        # NOTE: private in aiokafka 0.14: `_subscription`. The public `assignment()` returns the partitions' names
        # without their state, and `_do_commit_offsets` takes the object.
        return self.consumer._subscription.subscription.assignment

    @property
    def _coordinator(self) -> Any:
        # NOTE: private in aiokafka 0.14: `_coordinator`, here for the group's generation, which nothing public shows.
        return self.consumer._coordinator

    async def assigned(self, partitions: Iterable[TopicPartition]) -> None:
        self._assignment_count += 1
        self._generation = self._coordinator.generation
        self.assignments = {Partition(tp.topic, tp.partition): self._assignment_count for tp in partitions}
        # Nothing has been fetched yet, and nothing is until the listener knows the partitions.
        self.consumer.pause(*partitions)
        await self._skip_commits_of_another_topic(list(partitions))
        await self._listener.assigned(dict(self.assignments))
        self.consumer.resume(*partitions)

    async def _skip_commits_of_another_topic(self, partitions: list[TopicPartition]) -> None:
        """Read partitions from their beginning whose committed offset belongs to a predecessor of the topic.

        Raises TopicRecreated if this process has read the predecessor, too.
        """
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000):
                await self._check_topic_when_ready()
                committed = await self._coordinator.fetch_committed_offsets(partitions)  # retries without end
        except TimeoutError as error:
            raise SourceUnavailable(
                f"kafka {self._config.bootstrap_servers} did not tell the topic's id and the committed offsets of group"
                f" {self._config.group_id} within {self._config.request_timeout_ms} ms; check the broker, start again"
            ) from error
        foreign = [tp for tp, offset in committed.items() if not self._identity.owns_commit(offset.metadata)]
        for tp, begin in (await self.consumer.beginning_offsets(foreign) if foreign else {}).items():
            log.warning(
                "the committed offset is of a topic that was deleted: reading the new one from its beginning",
                topic=tp.topic,
                partition=tp.partition,
                committed=committed[tp].offset,
            )
            self.consumer.seek(tp, begin)

    async def _check_topic_when_ready(self) -> None:
        while True:
            try:
                return await self.check_topic()
            except errors.KafkaError as error:
                if not is_transient(error):
                    raise
                await asyncio.sleep(METADATA_POLL_S)

    async def revoked(self) -> None:
        """Revoke every partition: rebalancing is eager, even for those that come back."""
        if self.assignments and not self._coordinator.member_id and await is_instance_taken(self._config):
            self.failure = SourceError(describe(self._config, FENCED_INSTANCE, "it joined later"))
            self.assignments = {}
            # NOTE: private in aiokafka 0.14: the coordinator's `_max_poll_interval`. A member that has not polled for
            # longer does not join again, and nothing public keeps it from that: it would take the place back.
            self._coordinator._max_poll_interval = 0
            return
        try:
            if self.assignments:
                await self._listener.revoked(list(self.assignments))
        finally:
            self.assignments = {}


class _ListenerAdapter(ConsumerRebalanceListener):
    def __init__(self, member: GroupMember) -> None:
        self._member = member

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> Any:
        return self._assigned(assigned)

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> Any:
        return self._keep_failure(self._member.revoked)

    async def _assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._keep_failure(lambda: self._member.assigned(assigned))
        self._member.was_assigned.set()

    async def _keep_failure(self, callback: Callable[[], Any]) -> None:
        try:
            await callback()
        except Exception as error:
            log.error("rebalance callback failed", error=repr(error))
            self._member.failure = error
