"""Counters merged through a real Valkey: they converge, survive restarts and outages, and fill rec:popular."""

import asyncio

import numpy as np
import pytest

from tests.worker.redis.counting import Process, assert_equal_counts, run_rounds
from worker.config import Config, RedisConfig
from worker.lookup.lookup import Lookup
from worker.redis.client import RedisClient
from worker.replay.local_servers import LocalValkey

DAY = 24 * 60  # in minutes


async def test_index_fills_the_vocabulary_except_the_slots_reserved_for_new_items(server_client: RedisClient):
    one = Process(server_client)
    small = Process(server_client, max_items=16)
    one.observe([(f"i{number}", number) for number in range(30)])
    await run_rounds(one, small)
    assert small.counters.vocabulary.free_slots == 2
    assert len(small.rows()) == 14
    small.observe([("new", 60)])
    await run_rounds(small, one)
    assert "new" in one.rows()


async def test_artifact_counts_of_evicted_items_are_dropped(server_client: RedisClient):
    trained = Process(server_client)
    trained.observe([("a", 1), ("b", 2), ("a", 3)])
    process = Process(server_client, state=trained.counters.state())
    process.counters.vocabulary.evict(np.array([1]))
    process.counters.vocabulary.admit("x")
    await run_rounds(process)
    assert process.rows()["x"] == (0.0, {})
    assert process.rows()["b"][0] > 0
    assert not process.rows()["b"][1]


async def test_two_processes_converge_to_the_counts_of_a_single_one(server_client: RedisClient):
    one, other, alone = (Process(server_client) for _ in range(3))
    here = [[("a", 1), ("b", 2), ("c", 3)], [("b", 5), ("a", 6)]]
    there = [[("a", 2), ("c", 4 * DAY)], [("d", 3 * DAY), ("b", 3 * DAY + 1)]]
    later = [("a", 5 * DAY), ("d", 5 * DAY)]
    one.observe(*here)
    other.observe(*there)
    await run_rounds(one, other)
    one.observe(later)
    await run_rounds(one, other)
    alone.observe(*here)
    alone.observe(*there)
    alone.observe(later)
    assert_equal_counts(one, other)
    assert_equal_counts(one, alone)


async def test_restarted_process_has_all_items_and_counts(server_client: RedisClient):
    before = Process(server_client)
    before.observe([("a", 1), ("b", 2)], [("c", 3), ("b", 4)])
    assert await before.store.merge()
    after = Process(server_client)
    assert await after.store.merge()
    assert_equal_counts(before, after)


async def test_restart_between_rounds_counts_nothing_twice(server_client: RedisClient):
    process = Process(server_client)
    process.observe([("a", 1), ("b", 2)])
    await run_rounds(process)
    restarted = Process(server_client)
    await run_rounds(restarted, process)
    assert restarted.popularity("a") == pytest.approx(1, rel=1e-3)


async def test_counts_of_an_outage_are_merged_after_it(server: LocalValkey, server_client: RedisClient):
    process = Process(server_client)
    process.observe([("a", 1), ("b", 2)])
    assert await process.store.merge()
    server.stop()
    process.observe([("b", 3), ("a", 4)])
    assert not await process.store.merge()
    assert process.popularity("a") == pytest.approx(2, rel=1e-3)
    server.start()  # empty: Redis has lost the earlier rows
    assert await process.store.merge()
    assert process.popularity("a") == pytest.approx(1, rel=1e-3)
    assert process.rows()["a"][1]["b"] == pytest.approx(1, rel=1e-3)


async def test_artifact_counts_seed_redis_once_and_survive_the_first_merge(server_client: RedisClient):
    trained = Process(server_client)
    trained.observe(*[[("a", 1), ("b", 2)]] * 4)
    processes = [Process(server_client, state=trained.counters.state()) for _ in range(2)]
    processes[0].observe([("a", 3)])
    await run_rounds(*processes)
    assert [process.popularity("a") for process in processes] == pytest.approx([5, 5], rel=1e-3)
    assert processes[1].rows()["a"][1]["b"] == pytest.approx(4, rel=1e-3)


async def test_full_row_in_redis_stays_bounded_and_admits_newcomers(server_client: RedisClient):
    process = Process(server_client, neighbours=4)
    for number in range(4):
        process.observe(*[[("hub", 1), (f"heavy{number}", 2)]] * 9)
        assert await process.store.merge()
    process.observe([("hub", 3), ("new", 4)])
    assert await process.store.merge()
    _, neighbours = process.rows()["hub"]
    assert len(neighbours) == 4
    assert "new" in neighbours


async def test_events_counted_during_a_merge_are_not_lost(server_client: RedisClient):
    process = Process(server_client)
    replies = server_client.replies

    async def observe_meanwhile(commands):
        server_client.replies = replies
        process.observe([("a", 5), ("b", 6)])  # the deltas are being sent
        return await replies(commands)

    assert await process.store.merge()
    process.observe([("a", 1), ("b", 2)])
    server_client.replies = observe_meanwhile
    assert await process.store.merge()
    assert process.popularity("a") == pytest.approx(2, rel=1e-3)
    assert await process.store.merge()
    assert process.popularity("a") == pytest.approx(2, rel=1e-3)
    assert process.rows()["a"][1]["b"] == pytest.approx(2, rel=1e-3)


async def test_popular_items_answer_users_without_a_slate(server: LocalValkey, server_client: RedisClient):
    process = Process(server_client)
    process.observe([("a", 1), ("b", 2)], [("b", 3)])
    assert await process.store.merge()
    async with Lookup(Config(redis=RedisConfig(url=server.url, prefix=""))) as lookup:
        slate = await lookup.slate("nobody")
    assert [item.item_id for item in slate.items] == ["b", "a"]
    assert (slate.user_id, slate.strategy) == ("nobody", "popular")
    assert (slate.backend, slate.why) == ("numpy", "default")


async def test_last_counts_are_merged_when_the_process_stops(server_client: RedisClient, eventually):
    process = Process(server_client)
    after = Process(server_client)
    running = asyncio.create_task(process.store.run())
    await eventually(lambda: process.store._round)
    process.observe([("a", 1)])
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await after.store.merge()
    assert after.popularity("a") == pytest.approx(1, rel=1e-3)


async def test_stop_in_the_middle_of_a_round_counts_nothing_twice(server_client: RedisClient):
    process = Process(server_client)
    send = server_client.replies

    async def stop_before_the_reply(commands):
        replies = await send(commands)
        if commands and commands[0][0] == "FCALL":
            server_client.replies = send
            running.cancel()
            await asyncio.sleep(0)  # Redis has merged the counts, the reply has not arrived
        return replies

    process.observe([("a", 1), ("b", 2)])
    server_client.replies = stop_before_the_reply
    running = asyncio.create_task(process.store.run())
    await asyncio.gather(running, return_exceptions=True)
    after = Process(server_client)
    assert await after.store.merge()
    assert after.popularity("a") == pytest.approx(1, rel=1e-3)


async def test_rows_of_the_far_future_take_no_counts_from_anyone_and_are_mended(server_client: RedisClient):
    """A process whose clock was years ahead has merged its rows; the others count on as if it had not."""
    runs = [[("a", minute), ("b", minute + 1), ("c", minute + 2)] for minute in range(50)]
    healthy = Process(server_client)
    healthy.observe(*runs)
    assert await healthy.store.merge()
    before = healthy.rows()
    dizzy = Process(server_client)
    dizzy.observe(*[[("a", 17 * 365 * DAY), ("b", 17 * 365 * DAY + 1)]] * 50)
    assert await dizzy.store.merge()
    assert dizzy.counters.newest_ms > 2_000_000_000_000
    await run_rounds(healthy)
    assert healthy.popularity("c") == pytest.approx(before["c"][0])
    for _ in range(2):
        healthy.observe(*runs)
        await run_rounds(healthy)
    starting = Process(server_client)
    await run_rounds(starting)
    for process in (healthy, starting):
        assert process.counters.newest_ms == 1_700_000_000_000 + 51 * 60_000
        assert process.popularity("c") == pytest.approx(3 * before["c"][0], rel=0.01)
        assert process.popularity("a") == pytest.approx(2 * before["a"][0] + 50, rel=0.05), "and the dizzy one's events"
