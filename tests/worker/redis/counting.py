"""Counters of processes that share a Redis, for tests of their merges."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.counters.counters import Counters
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EVENT_DTYPE, Histories, item_hash
from worker.config import Config, CountersConfig, HealthConfig
from worker.redis.client import RedisClient
from worker.redis.counters.counter_index import INDEX_SHARDS
from worker.redis.counters.shared_counters import CounterStore
from worker.redis.slates import SlateStore

HALF_LIFE_DAYS = 10.0
History = list[tuple[str, int]]  # (item, minute)


class Process:
    """One worker's counters with their store. Without `state` it starts with nothing but Redis."""

    def __init__(
        self,
        client: RedisClient,
        neighbours: int = 16,
        state: dict | None = None,
        max_items: int = 1000,
        drain_timeout_s: float = 20,
    ) -> None:
        config = Config(
            counters=CountersConfig(half_life_days=HALF_LIFE_DAYS, neighbours=neighbours),
            health=HealthConfig(drain_timeout_s=drain_timeout_s),
        )
        vocabulary = Vocabulary("ab" if state else "", max_items)
        self.counters = Counters(vocabulary, HALF_LIFE_DAYS, neighbours, window_events=3)
        if state:
            self.counters.restore(state)
        self.store = CounterStore(client, config, self.counters, SlateStore(client, config.slates), self.run)

    async def run(self, function: Callable):
        return function()

    def observe(self, *histories: History) -> None:
        """Count each history as that of a new user."""
        rings = []
        for history in histories:
            self.counters.vocabulary.admit(item for item, _ in history)
            events = np.zeros(len(history), EVENT_DTYPE)
            events["item"] = [item_hash(item) for item, _ in history]
            events["ts_action_device"] = [1_700_000_000_000 + minute * 60_000 for _, minute in history]
            rings.append(events.tobytes())
        packed = Histories.from_rings(rings)
        self.counters.observe(packed, np.ones(len(packed.events), bool))

    def rows(self) -> dict[str, tuple[float, dict[str, float]]]:
        """Return popularity and neighbours of every item, as of this process's newest event."""
        ids = self.counters.vocabulary.item_ids
        rows = self.counters.rows(np.arange(1, len(ids), dtype=np.int32))
        columns = rows.columns.tolist()
        weights = rows.weights.tolist()
        return {
            ids[token]: (
                float(rows.popularity[token - 1]),
                {ids[c]: w for c, w in zip(columns[token - 1], weights[token - 1], strict=True) if w},
            )
            for token in range(1, len(ids))
        }

    def popularity(self, item: str) -> float:
        return self.rows()[item][0]


def assert_equal_counts(one: Process, other: Process) -> None:
    """Compare all rows; weights are float32 in Redis."""
    rows = one.rows()
    other_rows = other.rows()
    assert rows
    assert rows.keys() == other_rows.keys()
    for item, (popularity, neighbours) in rows.items():
        assert other_rows[item][0] == pytest.approx(popularity, rel=1e-5)
        assert other_rows[item][1] == pytest.approx(neighbours, rel=1e-4)


async def run_rounds(*processes: Process) -> None:
    """Run enough rounds for every process to read every shard after the last delta."""
    for _ in range(INDEX_SHARDS + 1):
        for process in processes:
            assert await process.store.merge()
