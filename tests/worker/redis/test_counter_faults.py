"""Counters merged while rows are damaged, replies are lost, shards are full, data is lost, or the process stops."""

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.worker.redis.counting import Process, assert_equal_counts, run_rounds
from worker.config import RedisConfig
from worker.errors import StoreUnavailable
from worker.redis.client import RedisClient, connect
from worker.redis.counters.counter_index import index_shard
from worker.redis.functions import COUNT
from worker.redis.keys import Keys
from worker.replay.local_servers import LocalValkey

HEADER = struct.Struct("<BBHqd")
Eventually = Callable[..., Awaitable[Any]]
Logged = Callable[[], list[dict[str, Any]]]


class ShardValkey(LocalValkey):
    """A node of a cluster that serves although another node owns no slot of its own."""

    def _command(self) -> Sequence[str]:
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[LocalValkey]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ShardValkey(tmp_path / str(number))) for number in range(2)]


@pytest.fixture
async def impatient_client(server: LocalValkey) -> AsyncIterator[RedisClient]:
    """A client of `server` that waits 0.3 s for a reply."""
    client = await connect(RedisConfig(url=server.url, timeout_s=0.3))
    yield client
    await client.aclose()


def count_invalid() -> float:
    return REGISTRY.get_sample_value("millrace_counters_invalid_total") or 0


DAMAGED_ROWS = {
    "another type": ("LPUSH", "x"),
    "an empty value": ("SET", b""),
    "a short value": ("SET", b"\x02\x0cshort"),
    "another format": ("SET", HEADER.pack(9, 12, 0, 1, 1.0)),
    "pairs that are missing": ("SET", HEADER.pack(2, 12, 3, 1, 1.0)),
    "bytes after the pairs": ("SET", HEADER.pack(2, 12, 0, 1, 1.0) + b"xyz"),
}
UNREADABLE_ROWS = {
    "no number": ("SET", HEADER.pack(2, 12, 0, 1, float("nan"))),
    "an infinite number": ("SET", HEADER.pack(2, 12, 0, 1, float("inf"))),
    "a time before all times": ("SET", HEADER.pack(2, 12, 0, -(2**63), 1.0)),
}


@pytest.mark.parametrize("content", DAMAGED_ROWS.values(), ids=DAMAGED_ROWS)
async def test_row_that_cannot_be_merged_is_skipped_and_all_others_are_merged_once(
    server_client: RedisClient, logged: Logged, content: tuple
):
    """The damaged row is the first one: it used to keep those behind it away, and to repeat those beside it."""
    process = Process(server_client)
    items = [f"i{number}" for number in range(70)]
    before = count_invalid()
    await server_client.call(content[0], Keys().counts("i0"), content[1])
    process.observe(*[[(item, 1)] for item in items])
    await run_rounds(process)
    assert [process.popularity(item) for item in items[1:]] == pytest.approx([1] * 69, rel=1e-3)
    assert await server_client.call("EXISTS", "rec:popular")
    assert count_invalid() > before
    lines = [line for line in logged() if line["event"] == "skipping invalid counters"]
    assert {line["key"] for line in lines} == {Keys().counts("i0")}
    assert all(line["reason"] for line in lines)
    process.observe([("i1", 2)])
    assert await process.store.merge()
    starting = Process(server_client)
    await run_rounds(starting)
    assert starting.popularity("i1") == pytest.approx(2, rel=1e-3)
    assert starting.popularity("i69") == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("content", UNREADABLE_ROWS.values(), ids=UNREADABLE_ROWS)
async def test_row_with_impossible_counts_is_not_taken_over(server_client: RedisClient, content: tuple):
    process = Process(server_client)
    process.observe([("a", 1), ("b", 2)])
    assert await process.store.merge()
    before = count_invalid()
    await server_client.call(content[0], Keys().counts("a"), content[1])
    await run_rounds(process)
    assert count_invalid() > before
    assert process.popularity("a") == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("member", [b"\xff\xfe", b"", b"x" * 300])
async def test_index_member_that_is_no_item_is_skipped_and_named(
    server_client: RedisClient, logged: Logged, member: bytes
):
    process = Process(server_client)
    process.observe([("a", 1)])
    assert await process.store.merge()
    before = count_invalid()
    await server_client.call("SADD", Keys().index(index_shard("a")), member)
    starting = Process(server_client)
    assert await starting.store.merge()
    assert starting.popularity("a") == pytest.approx(1, rel=1e-3)
    assert count_invalid() == before + 1
    assert Keys().index(index_shard("a")) in [line.get("key") for line in logged()]


async def test_index_of_another_type_does_not_stop_the_merges(server_client: RedisClient):
    await server_client.call("SET", Keys().index(index_shard("a")), "x")
    process = Process(server_client)
    process.observe([("a", 1)])
    await run_rounds(process)
    assert process.popularity("a") == pytest.approx(1, rel=1e-3)
    assert await server_client.call("EXISTS", Keys().counts("a"))


async def test_merge_whose_reply_was_lost_counts_once(
    server: LocalValkey, server_client: RedisClient, impatient_client: RedisClient
):
    process, other = Process(impatient_client), Process(server_client)
    assert await process.store.merge()
    assert await other.store.merge()
    process.observe([("a", 1), ("b", 2)])
    os.kill(server.pid, signal.SIGSTOP)
    assert not await process.store.merge()
    os.kill(server.pid, signal.SIGCONT)  # the server now runs the merge that timed out
    other.observe([("a", 3), ("b", 4)])
    assert await other.store.merge()
    process.observe([("a", 5)])
    assert await process.store.merge()
    await run_rounds(other)
    assert [each.popularity("a") for each in (process, other)] == pytest.approx([3, 3], rel=1e-3)
    assert process.rows()["a"][1]["b"] == pytest.approx(2, rel=1e-3)


async def test_merge_that_never_reached_redis_is_made_up_for(server_client: RedisClient):
    process = Process(server_client)
    process.observe([("a", 1)])
    assert await process.store.merge()
    process.observe([("a", 2)])
    send = server_client.replies

    async def lose(commands: Sequence) -> list:
        server_client.replies = send
        raise StoreUnavailable("the request was lost")

    server_client.replies = lose
    assert not await process.store.merge()
    assert await process.store.merge()
    starting = Process(server_client)
    assert await starting.store.merge()
    assert [each.popularity("a") for each in (process, starting)] == pytest.approx([2, 2], rel=1e-3)


async def test_repetition_is_told_after_sixteen_other_merges_and_marks_stay_few(server_client: RedisClient):
    processes = [Process(server_client) for _ in range(20)]
    for process in processes:
        process.observe([("a", 1)])
        assert await process.store.merge()
    row = await server_client.call("GET", Keys().counts("a"))
    assert len(row) == HEADER.size + 16 * 8
    send = server_client.replies
    sent: list[Sequence] = []

    async def record(commands: Sequence) -> list:
        sent.append(commands)
        return await send(commands)

    server_client.replies = record
    processes[0].observe([("a", 2)])
    assert await processes[0].store.merge()
    server_client.replies = send
    [merge] = [command for commands in sent for command in commands if command[1] == COUNT.function]
    for process in processes[1:16]:
        process.observe([("a", 3)])
        assert await process.store.merge()
    await server_client.replies([merge])
    await run_rounds(processes[0])
    assert processes[0].popularity("a") == pytest.approx(36, rel=1e-2)


async def test_row_without_marks_of_an_earlier_format_is_continued(server_client: RedisClient):
    await server_client.call("SET", Keys().counts("a"), HEADER.pack(1, 12, 0, 1_700_000_000_000, 5.0))
    await server_client.call("SADD", Keys().index(index_shard("a")), "a")
    process = Process(server_client)
    assert await process.store.merge()
    assert process.popularity("a") == pytest.approx(5, rel=1e-3)
    process.observe([("a", 1)])
    assert await process.store.merge()
    assert process.popularity("a") == pytest.approx(6, rel=1e-3)


@pytest.fixture
async def shards(nodes: list[LocalValkey], eventually: Eventually) -> AsyncIterator[list[RedisClient]]:
    """Clients of the nodes, which have formed a cluster: each owns half of the slots."""
    clients = [RedisClient(RedisConfig(url=node.url)) for node in nodes]
    await clients[0].call("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    await clients[1].call("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    await clients[0].call("CLUSTER", "MEET", "127.0.0.1", nodes[1].port)

    async def formed() -> bool:
        states = [await client.call("CLUSTER", "INFO") for client in clients]
        return all(b"cluster_state:ok" in each and b"cluster_known_nodes:2" in each for each in states)

    await eventually(formed)
    yield clients
    for client in clients:
        await client.aclose()


@pytest.fixture
async def cluster(nodes: list[LocalValkey], shards: list[RedisClient]) -> AsyncIterator[RedisClient]:
    client = await connect(RedisConfig(url=nodes[0].url, cluster=True))
    yield client
    await client.aclose()


async def set_memory_limit(shard: RedisClient, limit: str) -> None:
    await shard.call("CONFIG", "SET", "maxmemory", limit)


async def test_full_shard_of_a_cluster_delays_its_own_rows_alone_and_none_counts_twice(
    shards: list[RedisClient], cluster: RedisClient
):
    process, starting = Process(cluster), Process(cluster)
    items = [f"i{number}" for number in range(100)]
    assert await process.store.merge()
    process.observe(*[[(item, 1)] for item in items])
    await set_memory_limit(shards[1], "1mb")
    for _ in range(3):
        assert not await process.store.merge()
    await set_memory_limit(shards[1], "0")
    assert [process.popularity(item) for item in items] == pytest.approx([1] * 100, rel=1e-3)
    assert await process.store.merge()
    await run_rounds(starting, process)
    assert_equal_counts(process, starting)
    assert [starting.popularity(item) for item in items] == pytest.approx([1] * 100, rel=1e-3)


async def test_artifact_counts_that_a_full_shard_refuses_are_shared_later(
    shards: list[RedisClient], cluster: RedisClient
):
    """The slot of b's row is the full shard's, that of a's is not."""
    trained = Process(cluster)
    trained.observe(*[[("a", 1), ("b", 2)]] * 4)
    await set_memory_limit(shards[1], "1mb")
    process = Process(cluster, state=trained.counters.state())
    assert not await process.store.merge()
    await set_memory_limit(shards[1], "0")
    assert await process.store.merge()
    starting = Process(cluster)
    assert await starting.store.merge()
    assert [starting.popularity(item) for item in "ab"] == pytest.approx([4, 4], rel=1e-3)


async def test_index_is_written_again_after_redis_lost_its_data(server_client: RedisClient):
    process = Process(server_client)
    process.observe([("a", 1), ("b", 2)], [("c", 1)])
    await run_rounds(process)
    await server_client.call("FLUSHALL")
    process.observe([("a", 3), ("b", 4)])
    await run_rounds(process)
    starting = Process(server_client)
    assert await starting.store.merge()
    assert starting.rows().keys() == {"a", "b"}, "c was not counted since"


async def test_stop_while_counters_are_loaded_ends_the_load_and_merges_what_was_counted(server_client: RedisClient):
    """A million rows take tens of seconds to load; here a load takes for ever."""
    process = Process(server_client, drain_timeout_s=60)
    send = server_client.replies
    loading = asyncio.Event()

    async def load_slowly(commands: Sequence) -> list:
        if commands[0][0] == "SMEMBERS":
            loading.set()
            await asyncio.Future()
        return await send(commands)

    server_client.replies = load_slowly
    running = asyncio.create_task(process.store.run())
    await loading.wait()
    process.observe([("a", 1)])
    running.cancel()
    async with asyncio.timeout(3):
        await asyncio.gather(running, return_exceptions=True)
    server_client.replies = send
    after = Process(server_client)
    assert await after.store.merge()
    assert after.popularity("a") == pytest.approx(1, rel=1e-3)


async def test_last_merge_takes_no_longer_than_the_drain_timeout(
    server: LocalValkey, server_client: RedisClient, eventually: Eventually, logged: Logged
):
    process = Process(server_client, drain_timeout_s=0.5)
    running = asyncio.create_task(process.store.run())
    await eventually(lambda: process.store._round)
    process.observe([("a", 1)])
    os.kill(server.pid, signal.SIGSTOP)
    start_s = asyncio.get_running_loop().time()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert asyncio.get_running_loop().time() - start_s < 1.5
    assert "the last counts of this process are not merged" in [line["event"] for line in logged()]
    os.kill(server.pid, signal.SIGCONT)
