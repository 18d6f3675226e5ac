"""Commit completed offsets: periodically, and when partitions are revoked."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from worker import logging, metrics
from worker.config import HealthConfig
from worker.errors import MillraceError
from worker.interfaces import Partition, Source
from worker.stream.offset_tracker import OffsetTracker

log = logging.get("offsets")


class OffsetCommitter:
    """Implements RebalanceListener, and commits the tracker's committable offsets through the source."""

    def __init__(
        self,
        config: HealthConfig,
        tracker: OffsetTracker,
        source: Source,
        forget: Callable[[Partition], None] = lambda _: None,
    ) -> None:
        """forget: called with each revoked partition, to drop its cached rings."""
        self._config = config
        self._tracker = tracker
        self._source = source
        self._forget = forget
        # Of the last revocation, until the next assignment: what the next owner reads again.
        self._left_uncommitted: dict[Partition, int] = {}
        self.left_open = 0

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        self._left_uncommitted = {}
        self.left_open = 0
        for partition, assignment in partitions.items():
            self._tracker.assign(partition, assignment)
        log.info("partitions assigned", partitions=_names(partitions))
        if not partitions:
            log.warning(
                "no partition is assigned: the group has more members than the topic has partitions, or it has none"
            )

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        """Wait until nothing is open, at most `drain_timeout_s`, then commit; the next owner reads the rest again."""
        partitions = list(partitions)
        try:
            await asyncio.wait_for(self._tracker.wait_drained(partitions), self._config.drain_timeout_s)
        except TimeoutError:
            log.warning("revoked before drained: the next owner reads the rest again", partitions=_names(partitions))
        await self.commit()
        owed = self._source.uncommitted()
        self._left_uncommitted = {partition: owed[partition] for partition in partitions if partition in owed}
        open_before = self._tracker.open_count
        for partition in partitions:
            self._tracker.revoke(partition)
            self._forget(partition)
        self.left_open = open_before - self._tracker.open_count
        log.info("partitions revoked", partitions=_names(partitions))

    async def commit(self) -> None:
        if offsets := self._tracker.committable():
            await self._source.commit(offsets, self._tracker.assignments())
            metrics.COMMITS.inc()

    async def commit_rest(self) -> Mapping[Partition, int]:
        """Commit before the end, also what earlier commits have left. Return the offsets that are not committed.

        Those of partitions that were just revoked are among them.
        """
        try:
            await self._source.commit(self._tracker.committable(), self._tracker.assignments())
        except MillraceError as error:  # on the way out: the error that led there must not be replaced
            log.warning("last commit failed", error=str(error))
        return self._left_uncommitted | dict(self._source.uncommitted())

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._config.commit_interval_s)
            await self.commit()


def _names(partitions: Iterable[Partition]) -> list[str]:
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
