"""Which offsets are settled, and how far each partition may be committed.

The frontier of a partition is the next offset to commit: one past the newest record before which nothing is open.
Offsets may have gaps (transaction markers, compaction): only records that were opened count. An epoch is one assignment
of a partition; what comes late for an older one is ignored.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from worker.interfaces import Clock, Fetched, Partition, Ticket


@dataclass(slots=True)
class _Account:
    """One partition in one epoch."""

    epoch: int
    order: deque[int] = field(default_factory=deque)  # offsets from the frontier on, open or done, as they were opened
    open: set[int] = field(default_factory=set)
    polls: deque[tuple[int, float]] = field(default_factory=deque)  # (last offset, opened_s): ages without a time each
    frontier: int | None = None
    told: int | None = None  # the frontier that was last handed out
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # nothing is open

    def advance(self) -> None:
        while self.order and self.order[0] not in self.open:
            self.frontier = self.order.popleft() + 1
            while self.polls and self.polls[0][0] < self.frontier:
                self.polls.popleft()
        if not self.open:
            self.idle.set()


class Ledger:
    """Constant time per record to open and to settle. Used by one event loop's tasks; nothing in it blocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._accounts: dict[Partition, _Account] = {}
        self.open_count = 0
        self.settled_count = 0

    def assign(self, partition: Partition, epoch: int) -> None:
        """The partition is owned now. What an earlier epoch left open is forgotten."""
        self.revoke(partition)
        self._accounts[partition] = _Account(epoch)
        self._accounts[partition].idle.set()

    def revoke(self, partition: Partition) -> None:
        """The partition is gone: whoever waits for it to drain is let go."""
        if account := self._accounts.pop(partition, None):
            self.open_count -= len(account.open)
            account.open.clear()
            account.idle.set()

    def open(self, fetched: Fetched) -> None:
        """Claim a poll's records, in their order, before anything is done with them."""
        account = self._accounts.get(fetched.partition)
        if account is None or account.epoch != fetched.epoch or not fetched.records:
            return
        offsets = [record.offset for record in fetched.records]
        self.open_count -= len(account.open)
        account.order.extend(offsets)
        account.open.update(offsets)
        self.open_count += len(account.open)
        account.polls.append((offsets[-1], self._clock.monotonic()))
        account.idle.clear()

    def done(self, tickets: Iterable[Ticket]) -> None:
        """Settle records. Twice is harmless; tickets of another epoch are ignored."""
        touched: dict[Partition, _Account] = {}
        for partition, epoch, offset in tickets:
            account = self._accounts.get(partition)
            if account is not None and account.epoch == epoch and offset in account.open:
                account.open.remove(offset)
                self.open_count -= 1
                self.settled_count += 1
                touched[partition] = account
        for account in touched.values():
            account.advance()

    def frontiers(self) -> dict[Partition, int]:
        """The next offsets to commit, of the partitions where they have moved since this was last asked."""
        moved = {}
        for partition, account in self._accounts.items():
            if account.frontier is not None and account.frontier != account.told:
                moved[partition] = account.told = account.frontier
        return moved

    def epochs(self) -> dict[Partition, int]:
        """Of all owned partitions."""
        return {partition: account.epoch for partition, account in self._accounts.items()}

    @property
    def oldest_open_s(self) -> float | None:
        """Clock.monotonic() at which the oldest unsettled record was opened; None when nothing is open."""
        return min((account.polls[0][1] for account in self._accounts.values() if account.open), default=None)

    async def drained(self, partitions: Iterable[Partition]) -> None:
        """Returns when nothing of these partitions is open, or they are revoked. The caller sets the deadline."""
        accounts = [self._accounts[partition] for partition in partitions if partition in self._accounts]
        while waiting := [account for account in accounts if account.open]:
            await waiting[0].idle.wait()
