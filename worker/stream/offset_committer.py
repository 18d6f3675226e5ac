"""What this process owns and how far it is settled: assignment, revocation, commits."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from worker import logging, metrics
from worker.config import Health
from worker.interfaces import Partition, Source
from worker.stream.offset_tracker import Ledger

log = logging.get("offsets")


class Offsets:
    """Implements Rebalance: the source tells it of partitions, and it commits the ledger's frontier to the source."""

    def __init__(
        self, config: Health, ledger: Ledger, source: Source, forget: Callable[[Partition], None] = lambda _: None
    ) -> None:
        self._config, self._ledger, self._source, self._forget = config, ledger, source, forget

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        for partition, epoch in partitions.items():
            self._ledger.assign(partition, epoch)
        log.info("assigned", partitions=_names(partitions))

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        """Wait until they are settled, at most `drain_s`; what is not will be read again by their next owner."""
        partitions = list(partitions)
        try:
            await asyncio.wait_for(self._ledger.drained(partitions), self._config.drain_s)
        except TimeoutError:
            log.warning("revoked before all was settled: the next owner repeats it", partitions=_names(partitions))
        await self.commit()
        for partition in partitions:
            self._ledger.revoke(partition)
            self._forget(partition)
        log.info("revoked", partitions=_names(partitions))

    async def commit(self) -> None:
        if frontiers := self._ledger.frontiers():
            await self._source.commit(frontiers, self._ledger.epochs())
            metrics.COMMITS.inc()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._config.commit_s)
            await self.commit()


def _names(partitions: Iterable[Partition]) -> list[str]:
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
