"""The way out of a worker: answer what was admitted, commit, leave the source, and say what is left.

All of it ends by one deadline, whichever server does not answer.
"""

import asyncio
from collections.abc import Mapping, Sequence

from worker import logging
from worker.config import HealthConfig
from worker.deadline import Deadline
from worker.errors import NotDrained, SourceError
from worker.interfaces import Partition, Source
from worker.stream.health import HealthState
from worker.stream.offset_committer import OffsetCommitter
from worker.stream.offset_tracker import OffsetTracker

log = logging.get("drain")
ANSWER_FRACTION = 0.9  # of `drain_timeout_s`; the rest is for the last commit and for leaving the servers
CLOSE_S = 1.0  # beyond `drain_timeout_s`: so that with a short one, too, the last commit has time for its round trip
CHECK_S = 0.2  # how late a stop is noticed that comes while a source that has ended is drained


class Drain:
    """Ends one worker."""

    def __init__(
        self,
        config: HealthConfig,
        tracker: OffsetTracker,
        offsets: OffsetCommitter,
        source: Source,
        health: HealthState,
        deadline: Deadline,
    ) -> None:
        self._config = config
        self._tracker = tracker
        self._offsets = offsets
        self._source = source
        self._health = health
        self._deadline = deadline
        self._open = 0  # events, when answering ended
        self._cause = (
            "Kafka or Redis was slow or silent, a rebalance was under way, or health.drain_timeout_s = "
            f"{config.drain_timeout_s:g} is too short"
        )
        self._source_error: SourceError | None = None  # a record that cannot be decoded
        self._uncommitted: Mapping[Partition, int] = {}

    def begin(self) -> None:
        """Start the deadline, and report not ready."""
        start(self._deadline, self._config)
        self._health.problems["worker"] = "draining"

    async def answer(self, stages: Sequence[asyncio.Task]) -> None:
        """Let the stages answer what was admitted, without a limit unless `begin` was called; the rest is cancelled."""
        close_s = CLOSE_S + (1 - ANSWER_FRACTION) * self._config.drain_timeout_s
        while late := [stage for stage in stages if not stage.done()]:
            left_s = self._deadline.left_s() - close_s
            if left_s <= 0:
                log.warning("drain timed out: the next owner reads the rest again", open=self._tracker.open_count)
                break
            await asyncio.wait(late, timeout=min(left_s, CHECK_S))
        for stage in late:
            stage.cancel()

    async def close(self) -> None:
        """Commit what is completed, whatever ended the worker, and leave the source."""
        self._health.ready = False
        start(self._deadline, self._config)
        self._uncommitted = await self._offsets.commit_rest()
        self._open = self._tracker.open_count + self._offsets.left_open
        if self._open or self._uncommitted:
            log.warning("not drained", open=self._open, not_committed=self._names())
        self._cause = self._source.problem() or self._cause
        try:
            await self._source.stop()
        except SourceError as error:  # says that everything before a record is committed
            self._source_error = error

    def check(self) -> None:
        """Raise NotDrained unless every admitted event is answered and committed; then what ended the source."""
        if not self._open and not self._uncommitted:
            if self._source_error is not None:
                raise self._source_error
            return
        names = ", ".join(f"{name} up to {offset}" for name, offset in self._names().items())
        raise NotDrained(
            f"stopped with {self._open} events open; completed but not committed: {names or 'nothing'}; the next owner "
            f"of the partitions reads them again. {self._cause}"
        ) from self._source_error

    def _names(self) -> dict[str, int]:
        return {f"{topic}-{partition}": offset for (topic, partition), offset in sorted(self._uncommitted.items())}


def start(deadline: Deadline, config: HealthConfig) -> None:
    """Start the deadline of the whole way out."""
    deadline.start(config.drain_timeout_s + CLOSE_S)
