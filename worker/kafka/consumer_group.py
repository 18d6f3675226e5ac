"""This process's membership in the consumer group, built on aiokafka: numbered assignments and fenced commits.

aiokafka logs and swallows the exceptions of rebalance listeners, so they are kept here and raised by the next poll.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from worker import logging
from worker.config import KafkaConfig
from worker.interfaces import Partition, RebalanceListener
from worker.kafka.client import client_options

log = logging.get("group")
STOP_S = 10.0
NO_PARTITION = TopicPartition("", -1)  # polled to stay a member of the group without taking records


class GroupMember:
    """One member of the group.

    Reads committed records only. `consumer.getmany` raises when a position is missing or out of range.
    """

    def __init__(self, config: KafkaConfig, listener: RebalanceListener) -> None:
        self._config = config
        self._listener = listener
        self._generation = -1  # the group's generation when the partitions were assigned
        self._assignment_count = 0  # numbers the assignments
        self.assignments: dict[Partition, int] = {}
        self.failure: Exception | None = None  # raised by a rebalance callback, not yet re-raised
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
        )

    async def join(self) -> None:
        """Return when partitions are assigned. The caller sets the deadline."""
        self.consumer.subscribe([self._config.events_topic], listener=_ListenerAdapter(self))
        try:
            await self.consumer.start()
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Stop within STOP_S. A static member stays in the group until its session times out."""
        stopping = asyncio.ensure_future(self.consumer.stop())
        _, late = await asyncio.wait({stopping}, timeout=STOP_S)
        for task in late:
            task.cancel()
            log.warning("leaving the group timed out: it waits for the session timeout", group=self._config.group_id)

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit once, without a retry.

        Raises KafkaError; IllegalGenerationError when the generation is stale, whichever side notices it.
        """
        # NOTE: private in aiokafka 0.14: the coordinator's `_commit_lock` and `_do_commit_offsets`. Once the broker has
        # forgotten a member, its commits go out without a generation and might move offsets back, so the generation is
        # compared here. The public `commit()` retries internally, and may have lost the generation by then;
        # `_do_commit_offsets` builds its request before its first await, so this comparison holds for it.
        coordinator = self._coordinator
        to_commit = {TopicPartition(*partition): OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}
        async with coordinator._commit_lock:
            if not self.is_current:
                raise errors.IllegalGenerationError(self._config.group_id)
            await coordinator._do_commit_offsets(self._assignment, to_commit)

    @property
    def is_current(self) -> bool:
        """Whether the group's generation is still the one in which the partitions were assigned."""
        return self._coordinator.generation == self._generation

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
        await self._listener.assigned(dict(self.assignments))

    async def revoked(self) -> None:
        """Revoke every partition: rebalancing is eager, even for those that come back."""
        try:
            if self.assignments:
                await self._listener.revoked(list(self.assignments))
        finally:
            self.assignments = {}


class _ListenerAdapter(ConsumerRebalanceListener):
    def __init__(self, member: GroupMember) -> None:
        self._member = member

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> Any:
        return self._keep_failure(lambda: self._member.assigned(assigned))

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> Any:
        return self._keep_failure(self._member.revoked)

    async def _keep_failure(self, callback: Callable[[], Any]) -> None:
        try:
            await callback()
        except Exception as error:
            log.error("rebalance callback failed", error=repr(error))
            self._member.failure = error
