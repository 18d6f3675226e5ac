"""Load for the stream's benchmarks: behaviour events of many users over the items of a catalogue.

Users come in random order without repetition until all had their turn, so that coalescing gives nothing away: with
100,000 users and at most a few thousand events under way, a slate answers 1.0x events.
"""

import random
import time
from collections.abc import Iterator, Sequence

from pipeline.records import Event


class Shoppers:
    """An endless, seeded stream of events over `users` users and the items of a catalogue (Zipf-like popularity)."""

    def __init__(self, users: int, items: Sequence[str], seed: int = 5) -> None:
        self._users, self._items, self._dice = users, items, random.Random(seed)
        self._actions = ("view", "view", "view", "click", "click", "like", "cart", "purchase")

    def user_ids(self) -> list[str]:
        return [f"user-{number}" for number in range(self._users)]

    def events(self) -> Iterator[Event]:
        """`ts_ms` is the time of creation: a slate's `covers.oldest_ts_ms` gives its event's age."""
        users = self.user_ids()
        while True:
            self._dice.shuffle(users)
            for user in users:
                yield self.event(user, time.time_ns() // 1_000_000)

    def event(self, user: str, ts_ms: int) -> Event:
        dice = self._dice
        item = self._items[min(int(dice.paretovariate(0.6)) - 1, 10**9) % len(self._items)]
        return Event(user, item, dice.choice(self._actions), ts_ms, dwell_ms=dice.randrange(60_000), device="mobile")
