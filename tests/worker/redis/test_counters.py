"""Counters merged through a real Valkey: they converge, survive restarts and outages, and fill rec:popular."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.counters.counters import Counters
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EVENT_DTYPE, Histories, item_hash
from worker.config import Config
from worker.config import CountersConfig as CounterConfig
from worker.lookup.lookup import Lookup
from worker.redis.client import RedisClient, connect
from worker.redis.counters import INDEX_SHARDS, CounterStore
from worker.replay.local_servers import LocalValkey

HALF_LIFE_DAYS = 10.0
DAY = 24 * 60


class Process:
    """A worker's counters with their store; `restarted` has nothing but Redis."""

    def __init__(
        self, client: RedisClient, neighbours: int = 16, state: dict | None = None, max_items: int = 1000
    ) -> None:
        config = Config(counters=CounterConfig(half_life_days=HALF_LIFE_DAYS, neighbours=neighbours))
        self.counters = Counters(
            Vocabulary("ab" if state else "", max_items), HALF_LIFE_DAYS, neighbours, window_events=3
        )
        if state:
            self.counters.restore(state)
        self.store = CounterStore(client, config, self.counters, self.within)

    async def within(self, act: Callable):
        return act()

    def see(self, *runs: list[tuple[str, int]]) -> None:
        """Each run of (item, minutes) is a user's new history."""
        rings = []
        for run in runs:
            self.counters.vocabulary.admit(item for item, _ in run)
            events = np.zeros(len(run), EVENT_DTYPE)
            events["item"] = [item_hash(item) for item, _ in run]
            events["ts_action_device"] = [1_700_000_000_000 + minute * 60_000 for _, minute in run]
            rings.append(events.tobytes())
        self.counters.observe(Histories.from_rings(rings), np.array([len(run) for run in runs]))

    def rows(self) -> dict[str, tuple[float, dict[str, float]]]:
        """Popularity and neighbours of every item, as of this process's newest event."""
        ids = self.counters.vocabulary.item_ids
        rows = self.counters.rows(np.arange(1, len(ids), dtype=np.int32))
        columns, weights = rows.columns.tolist(), rows.weights.tolist()
        return {
            ids[token]: (
                float(rows.popularity[token - 1]),
                {ids[c]: w for c, w in zip(columns[token - 1], weights[token - 1], strict=True) if w},
            )
            for token in range(1, len(ids))
        }


def alike(one: Process, other: Process) -> bool:
    """Do both hold the same counts? Weights are float32 in Redis."""
    ours, theirs = one.rows(), other.rows()
    assert ours.keys() == theirs.keys()
    for item, (popularity, neighbours) in ours.items():
        assert theirs[item][0] == pytest.approx(popularity, rel=1e-5)
        assert theirs[item][1] == pytest.approx(neighbours, rel=1e-4)
    return bool(ours)


@pytest.fixture
def server(tmp_path: Path):
    with LocalValkey(tmp_path) as own:
        yield own


def scenario(server: LocalValkey, test: Callable[[RedisClient], Awaitable[None]]) -> None:
    async def within() -> None:
        client = await connect(Config(redis=_redis(server)).redis)
        try:
            await test(client)
        finally:
            await client.aclose()

    asyncio.run(asyncio.wait_for(within(), 60))


def _redis(server: LocalValkey):
    from worker.config import RedisConfig

    return RedisConfig(url=server.url, timeout_s=0.5)


async def rounds(*processes: Process) -> None:
    """So many that everyone has read every shard after the last delta."""
    for _ in range(INDEX_SHARDS + 1):
        for process in processes:
            assert await process.store.merge()


def test_the_index_fills_the_vocabulary_but_for_the_room_that_new_items_need(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        one, small = Process(client), Process(client, max_items=16)
        one.see([(f"i{number}", number) for number in range(30)])
        await rounds(one, small)
        assert small.counters.vocabulary.free_slots == 2
        assert len(small.rows()) == 14
        small.see([("new", 60)])
        await rounds(small, one)
        assert "new" in one.rows()

    scenario(server, test)


def test_what_an_artifact_counted_of_items_that_were_retired_meanwhile_goes_to_nobody(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        first = Process(client)
        first.see([("a", 1), ("b", 2), ("a", 3)])
        started = Process(client, state=first.counters.state())
        started.counters.vocabulary.evict(np.array([1]))
        started.counters.vocabulary.admit("x")
        await rounds(started)
        assert started.rows()["x"] == (0.0, {})
        assert started.rows()["b"][0] > 0
        assert not started.rows()["b"][1]

    scenario(server, test)


def test_two_processes_converge_to_what_one_would_have_counted(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        one, other, alone = Process(client), Process(client), Process(client)
        here = [[("a", 1), ("b", 2), ("c", 3)], [("b", 5), ("a", 6)]]
        there = [[("a", 2), ("c", 4 * DAY)], [("d", 3 * DAY), ("b", 3 * DAY + 1)]]
        one.see(*here)
        other.see(*there)
        await rounds(one, other)
        one.see([("a", 5 * DAY), ("d", 5 * DAY)])
        await rounds(one, other)
        alone.see(*here)
        alone.see(*there)
        alone.see([("a", 5 * DAY), ("d", 5 * DAY)])
        assert alike(one, other)
        assert alike(one, alone)

    scenario(server, test)


def test_a_restart_keeps_all_counts_and_knows_all_items(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        before, after = Process(client), Process(client)
        before.see([("a", 1), ("b", 2)], [("c", 3), ("b", 4)])
        assert await before.store.merge()
        assert await after.store.merge()
        assert alike(before, after)

    scenario(server, test)


def test_a_restart_in_the_middle_does_not_count_twice(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        process = Process(client)
        process.see([("a", 1), ("b", 2)])
        await rounds(process)
        again = Process(client)
        await rounds(again, process)
        assert again.rows()["a"][0] == pytest.approx(1, rel=1e-3)

    scenario(server, test)


def test_what_is_counted_during_an_outage_is_merged_after_it(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        process = Process(client)
        process.see([("a", 1), ("b", 2)])
        assert await process.store.merge()
        server.stop()
        process.see([("b", 3), ("a", 4)])
        assert not await process.store.merge()
        assert process.rows()["a"][0] == pytest.approx(2, rel=1e-3)
        server.start()  # empty: the rows of before are gone from Redis
        assert await process.store.merge()
        assert process.rows()["a"][0] == pytest.approx(1, rel=1e-3)
        assert process.rows()["a"][1]["b"] == pytest.approx(1, rel=1e-3)

    scenario(server, test)


def test_an_artifacts_counts_seed_redis_once_and_are_not_lost_by_the_first_merge(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        trained = Process(client)
        trained.see(*[[("a", 1), ("b", 2)]] * 4)
        state = trained.counters.state()
        processes = [Process(client, state=state) for _ in range(2)]
        processes[0].see([("a", 3)])
        await rounds(*processes)
        assert [each.rows()["a"][0] for each in processes] == pytest.approx([5, 5], rel=1e-3)
        assert processes[1].rows()["a"][1]["b"] == pytest.approx(4, rel=1e-3)

    scenario(server, test)


def test_a_full_row_in_redis_is_bounded_and_still_learns_newcomers(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        process = Process(client, neighbours=4)
        for number in range(4):
            process.see(*[[("hub", 1), (f"heavy{number}", 2)]] * 9)
            assert await process.store.merge()
        process.see([("hub", 3), ("new", 4)])
        assert await process.store.merge()
        _, neighbours = process.rows()["hub"]
        assert len(neighbours) == 4
        assert "new" in neighbours

    scenario(server, test)


def test_counting_goes_on_while_a_merge_is_under_way(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        process = Process(client)
        pipeline = client.pipeline

        async def interrupted(commands):
            client.pipeline = pipeline
            process.see([("a", 5), ("b", 6)])  # the deltas are on their way
            return await pipeline(commands)

        assert await process.store.merge()
        process.see([("a", 1), ("b", 2)])
        client.pipeline = interrupted
        assert await process.store.merge()
        assert process.rows()["a"][0] == pytest.approx(2, rel=1e-3)
        assert await process.store.merge()
        assert process.rows()["a"][0] == pytest.approx(2, rel=1e-3)
        assert process.rows()["a"][1]["b"] == pytest.approx(2, rel=1e-3)

    scenario(server, test)


def test_the_popular_items_answer_users_without_a_slate(server: LocalValkey):
    async def test(client: RedisClient) -> None:
        process = Process(client)
        process.see([("a", 1), ("b", 2)], [("b", 3)])
        assert await process.store.merge()
        async with Lookup(_redis(server)) as lookup:
            slate = await lookup.slate("nobody")
        assert [item.item_id for item in slate.items] == ["b", "a"]
        assert (slate.user_id, slate.strategy) == ("nobody", "popular")

    scenario(server, test)


def test_the_last_counts_are_merged_when_the_process_stops(server: LocalValkey, eventually):
    async def test(client: RedisClient) -> None:
        process, after = Process(client), Process(client)
        running = asyncio.create_task(process.store.run())
        await eventually(lambda: process.store._round)
        process.see([("a", 1)])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await after.store.merge()
        assert after.rows()["a"][0] == pytest.approx(1, rel=1e-3)

    scenario(server, test)


def test_a_stop_in_the_middle_of_a_round_counts_nothing_twice(server: LocalValkey, eventually):
    async def test(client: RedisClient) -> None:
        process, pipeline = Process(client), client.pipeline

        async def stopped(commands):
            replies = await pipeline(commands)
            if commands[0][0] == "FCALL":
                client.pipeline = pipeline
                running.cancel()
                await asyncio.sleep(0)  # Redis has added them, and the answer is on its way
            return replies

        process.see([("a", 1), ("b", 2)])
        client.pipeline = stopped
        running = asyncio.create_task(process.store.run())
        await asyncio.gather(running, return_exceptions=True)
        after = Process(client)
        assert await after.store.merge()
        assert after.rows()["a"][0] == pytest.approx(1, rel=1e-3)

    scenario(server, test)
