"""Load for the stream's benchmarks: behaviour events of many users over the items of a catalogue.

Users come in random order, and each one comes again only after all others have. So coalescing gains nothing: with
100,000 users and at most a few thousand events in flight, a slate answers 1.0x events.
"""

import random
import time
from collections.abc import Iterator, Sequence

from pipeline.records import Event

ACTIONS = ("view", "view", "view", "click", "click", "like", "cart", "purchase")


class Shoppers:
    """An endless, seeded stream of events over `users` users and the items of a catalogue (Zipf-like popularity)."""

    def __init__(self, users: int, items: Sequence[str], seed: int = 5) -> None:
        self._users = users
        self._items = items
        self._rng = random.Random(seed)

    def user_ids(self) -> list[str]:
        return [f"user-{number}" for number in range(self._users)]

    def events(self) -> Iterator[Event]:
        """Yield events created now: a slate's `covers.oldest_ts_ms` then tells its event's age."""
        users = self.user_ids()
        while True:
            self._rng.shuffle(users)
            for user in users:
                yield self.event(user, time.time_ns() // 1_000_000)

    def event(self, user: str, ts_ms: int) -> Event:
        item = self._items[min(int(self._rng.paretovariate(0.6)) - 1, 10**9) % len(self._items)]
        action = self._rng.choice(ACTIONS)
        return Event(user, item, action, ts_ms, dwell_ms=self._rng.randrange(60_000), device="mobile")
