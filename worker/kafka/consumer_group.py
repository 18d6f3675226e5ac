"""This process's membership in the consumer group, on aiokafka: assignments as epochs, and commits that are fenced.

What aiokafka does that is handled here: exceptions in rebalance listeners are logged and swallowed, so they are kept;
once the coordinator has forgotten a member, its commits go out without a generation and might move offsets back, so
the generation is compared where the request is made.
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


class GroupMember:
    """One member. Reads committed records only; positions that are missing or out of range are errors of getmany."""

    def __init__(self, config: KafkaConfig, rebalance: RebalanceListener) -> None:
        self._config, self._rebalance = config, rebalance
        self._generation = -1  # of the group, when the partitions were assigned
        self._assignment_count = 0  # counts; an epoch is the number of its assignment
        self.assignments: dict[Partition, int] = {}
        self.failure: Exception | None = None  # of a rebalance callback
        timeout_ms = max(config.request_timeout_ms, config.rebalance_timeout_ms + 5000)
        options: dict[str, Any] = client_options(config) | {
            "request_timeout_ms": timeout_ms  # a join waits until the other members have drained
        }
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
        """Returns when partitions are assigned. The caller sets the deadline."""
        self.consumer.subscribe([self._config.events_topic], listener=_Listener(self))
        try:
            await self.consumer.start()
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Within STOP_S; a static member stays in the group until its session ends."""
        stopping = asyncio.ensure_future(self.consumer.stop())
        _, late = await asyncio.wait({stopping}, timeout=STOP_S)
        for task in late:
            task.cancel()
            log.warning(
                "the group was not left in time; it will notice by the session's end", group=self._config.group_id
            )

    async def commit(self, offsets: Mapping[Partition, int]) -> None:
        """One attempt. KafkaError; IllegalGenerationError when the group has moved on, whoever notices it first."""
        # NOTE: private parts of aiokafka 0.14. Its public commit repeats inside, and may by then have lost the
        # generation; `_do_commit_offsets` builds its request before it first waits, so this comparison holds for it.
        coordinator, subscription = self._coordinator, self.consumer._subscription.subscription
        wanted = {TopicPartition(*partition): OffsetAndMetadata(offset, "") for partition, offset in offsets.items()}
        async with coordinator._commit_lock:
            if coordinator.generation != self._generation:
                raise errors.IllegalGenerationError(self._config.group_id)
            await coordinator._do_commit_offsets(subscription.assignment, wanted)

    def lag(self, partition: Partition) -> int:
        """Readable records beyond the last polled one, by the last fetch. Transaction markers and what lies behind an
        open transaction do not count: nothing can be read of them."""
        # NOTE: aiokafka's `position()` waits when there is none; its state says so without waiting.
        assignment = self.consumer._subscription.subscription.assignment
        state = assignment and assignment.state_value(TopicPartition(*partition))
        if state is None or not state.has_valid_position or state.highwater is None:
            return 0
        readable = state.highwater if state.lso is None or state.lso < 0 else state.lso
        return max(0, readable - state.position)

    @property
    def _coordinator(self) -> Any:
        return self.consumer._coordinator

    async def assigned(self, partitions: Iterable[TopicPartition]) -> None:
        self._assignment_count += 1
        self._generation = self._coordinator.generation
        self.assignments = {Partition(tp.topic, tp.partition): self._assignment_count for tp in partitions}
        await self._rebalance.assigned(dict(self.assignments))

    async def revoked(self) -> None:
        """Rebalancing is eager: every partition goes, even when it comes back."""
        try:
            if self.assignments:
                await self._rebalance.revoked(list(self.assignments))
        finally:
            self.assignments = {}


class _Listener(ConsumerRebalanceListener):
    def __init__(self, group: GroupMember) -> None:
        self._group = group

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> Any:
        return self._keep_failure(lambda: self._group.assigned(assigned))

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> Any:
        return self._keep_failure(self._group.revoked)

    async def _keep_failure(self, callback: Callable[[], Any]) -> None:
        try:
            await callback()
        except Exception as error:
            log.error("a rebalance failed", error=repr(error))
            self._group.failure = error
