"""Commits of the group's offsets: repeated until they are acknowledged, dropped once their assignment has passed."""

import asyncio
from collections.abc import Mapping

from aiokafka import errors

from worker import logging
from worker.config import KafkaConfig
from worker.deadline import Deadline
from worker.errors import TopicRecreated
from worker.interfaces import Clock, Partition
from worker.kafka.client import raise_unless_transient
from worker.kafka.consumer_group import GroupMember

log = logging.get("source")
RETRY_S = 0.2
STALE_GENERATION = (errors.UnknownMemberIdError, errors.IllegalGenerationError, errors.RebalanceInProgressError)


class OffsetCommits:
    """The offsets of one member that are owed to the broker."""

    def __init__(self, config: KafkaConfig, member: GroupMember, clock: Clock, deadline: Deadline) -> None:
        self._config = config
        self._member = member
        self._clock = clock
        self._deadline = deadline
        # (assignment, next offset) of each partition whose commit is not yet acknowledged
        self._pending: dict[Partition, tuple[int, int]] = {}
        self.running: asyncio.Task[bool] | None = None

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        """See KafkaSource."""
        owned = self._member.assignments
        self._pending |= {
            partition: (assignments[partition], offset)
            for partition, offset in offsets.items()
            if partition in owned and owned[partition] == assignments.get(partition)
        }
        give_up_s = self._clock.monotonic() + self._deadline.share_s(self._config.request_timeout_ms / 1000)
        while not await self._attempt(give_up_s):
            if self._clock.monotonic() >= give_up_s:
                log.warning("commit pending, coordinator unavailable", offsets=_offsets_by_name(self.uncommitted()))
                return
            await asyncio.sleep(min(RETRY_S, self._deadline.left_s()))

    def uncommitted(self) -> dict[Partition, int]:
        """Return the offsets to commit, dropping those of a passed assignment: another member may be further by now."""
        owned = self._member.assignments
        self._pending = {
            partition: (assignment, offset)
            for partition, (assignment, offset) in self._pending.items()
            if owned.get(partition) == assignment
        }
        return {partition: offset for partition, (_, offset) in self._pending.items()}

    async def _attempt(self, give_up_s: float) -> bool:
        """Wait until then for the running attempt, started if there is none; return whether a commit can end.

        An attempt is never cancelled: it would be unknown what was committed. aiokafka may wait for its reply longer
        than a commit may take.
        """
        if self.running is None:
            self.running = asyncio.create_task(self._commit_once(), name="commit attempt")
        attempt = self.running
        await asyncio.wait({attempt}, timeout=max(0.0, give_up_s - self._clock.monotonic()))
        if not attempt.done():
            return False
        if self.running is attempt:
            self.running = None
        return attempt.result()

    async def _commit_once(self) -> bool:
        """Return whether nothing is left to try: all is acknowledged, or the group is about to rebalance."""
        sent = self.uncommitted()
        try:
            if sent:
                await self._member.commit(sent)
        except TopicRecreated:
            self._pending = {}
            raise
        except STALE_GENERATION:
            log.info("commit skipped, generation is stale", offsets=_offsets_by_name(sent))
            return True
        except errors.KafkaError as error:
            raise_unless_transient(self._config, error, self._config.events_topic)
            return False
        for partition, offset in sent.items():  # offsets that moved meanwhile stay pending
            if self._pending.get(partition, (0, -1))[1] == offset:
                del self._pending[partition]
        return not self.uncommitted()


def _offsets_by_name(offsets: Mapping[Partition, int]) -> dict[str, int]:
    return {f"{topic}-{partition}": offset for (topic, partition), offset in sorted(offsets.items())}
