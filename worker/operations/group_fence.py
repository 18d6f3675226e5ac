"""Keep workers out of the consumer group while its rings are rewritten."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Self

from aiokafka import TopicPartition
from msgspec.structs import replace

from worker.config import KafkaConfig
from worker.errors import SourceError
from worker.interfaces import Clock, Partition
from worker.kafka.client import list_partitions, retry_at_start, with_admin
from worker.kafka.consumer_group import NO_PARTITION, GroupMember


class GroupFence:
    """Membership of the group that owns every partition of the events topic.

    A worker that starts gets partitions only after this member has given them up: a running write is waited for, and
    every later one raises SourceError.
    """

    def __init__(self, config: KafkaConfig, clock: Clock, partitions: Iterable[TopicPartition]) -> None:
        """partitions: all of the events topic."""
        # Not a static member: it would take over the identity of a worker, and stay in the group afterwards.
        self._config = replace(config, group_instance_id=None)
        self._clock = clock
        self._partitions = {Partition(*each) for each in partitions}
        self._owned: set[Partition] = set()  # at the first assignment
        self._given_up = False
        self._writing = asyncio.Lock()
        self._member_or_none: GroupMember | None = None

    async def __aenter__(self) -> Self:
        """Join the group. Raises SourceError when it has other members, SourceUnavailable, TopicRecreated."""
        if count := await self._count_members():
            raise self._error(f"has members that push to the same rings ({count})")

        async def join() -> GroupMember:
            self._owned = set()
            self._given_up = False
            member = GroupMember(self._config, self, self._clock)
            await member.join()
            member.consumer.pause(*member.consumer.assignment())  # another consumer reads
            return member

        self._member_or_none = await retry_at_start(self._config, self._clock, join)
        if self._owned != self._partitions:
            await self._member.leave()
            raise self._member.failure or await self._lost("was joined by a worker")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._member_or_none is not None:
            await self._member_or_none.leave()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Hold the partitions during the body. Raises SourceError once they are given up."""
        async with self._writing:
            await self._check_owned()
            yield

    async def keep_alive(self) -> None:
        """Poll no partition: a member that does not poll is dropped from the group. Raises as `writing`."""
        await self._check_owned()
        await self._member.consumer.getmany(NO_PARTITION, timeout_ms=0)

    async def _check_owned(self) -> None:
        if self._given_up or not self._member.is_current:
            raise await self._lost(
                "was joined by a worker, or has dropped this command, before all rings were restored"
            )

    async def _lost(self, text: str) -> SourceError:
        """Return why the partitions were given up: because the topic got more of them, else as `text` says."""
        topic = self._config.events_topic
        now = await list_partitions(self._config, self._clock, topic)
        if {Partition(*each) for each in now} == self._partitions:
            return self._error(text)
        return SourceError(
            f"topic {topic} has {len(now)} partitions, and had {len(self._partitions)} when the rebuild began; run "
            f"rebuild again: it keeps what it has restored"
        )

    @property
    def _member(self) -> GroupMember:
        assert self._member_or_none is not None, "enter the fence first"
        return self._member_or_none

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        self._owned = self._owned or set(partitions)

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        self._given_up = True
        async with self._writing:
            pass

    async def _count_members(self) -> int:
        group_id = self._config.group_id
        responses = await with_admin(
            self._config, self._clock, lambda admin: admin.describe_consumer_groups([group_id])
        )
        return sum(len(group["members"]) for each in responses for group in each.to_object()["groups"])

    def _error(self, text: str) -> SourceError:
        return SourceError(
            f"group {self._config.group_id} {text}; stop the workers, then run rebuild again: it keeps what it has "
            f"restored (--force: without joining the group, when its members are dead)"
        )
