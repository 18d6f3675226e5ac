"""Many lookups at a time: they share pipelines, and one that fails is no other's concern."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from pipeline.slates import Covers, Latency, Slate, SlateItem
from tests.worker.redis.clusters import cluster
from worker.config import Config, RedisConfig, ServeConfig, SlatesConfig
from worker.errors import MillraceError, StoreError, StoreUnavailable, UnknownUser
from worker.lookup.http import application
from worker.lookup.lookup import Lookup
from worker.redis.client import connect
from worker.redis.slates import SlateStore
from worker.replay.local_servers import LocalValkey


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalValkey]:
    """A Valkey of this test alone."""
    with LocalValkey(tmp_path) as server:
        yield server


def make_slate(user: str) -> Slate:
    return Slate(
        user_id=user,
        items=[SlateItem(f"of-{user}", 0.5, None, None, None, "retrieval")],
        strategy="simple",
        backend="numpy",
        why="best",
        model_version="v1",
        covers=Covers("events", 0, 1, 1, 1, 5),
        created_ms=1,
        latency_ms=Latency(total=1.5),
    )


async def put(config: Config, users: Sequence[str]) -> None:
    client = await connect(config.redis, config.key_prefix)
    try:
        await SlateStore(client, SlatesConfig()).put([make_slate(user) for user in users])
    finally:
        await client.aclose()


async def look_up(lookup: Lookup, users: Sequence[str]) -> list[Slate | MillraceError]:
    """Start all lookups at once; return each one's slate or error."""

    async def one(user: str) -> Slate | MillraceError:
        try:
            return await lookup.slate(user)
        except MillraceError as error:
            return error

    return await asyncio.gather(*map(one, users))


async def test_thousands_of_lookups_at_once_are_all_answered_each_with_its_own_slate(server: LocalValkey) -> None:
    config = Config(redis=RedisConfig(url=server.url, timeout_s=20))
    users = [f"u{number}" for number in range(2000)]
    await put(config, users)
    async with Lookup(config) as lookup:
        assert await look_up(lookup, users) == [make_slate(user) for user in users]
        commands = await lookup._client.info("stats")
        clients = await lookup._client.info("clients")
    assert clients["connected_clients"] <= 3  # the lookups', this one, and those of the set-up until they are closed
    assert commands["total_connections_received"] < 20


async def test_users_without_a_slate_among_others_share_one_read_of_the_popular_one(server: LocalValkey) -> None:
    config = Config(redis=RedisConfig(url=server.url))
    await put(config, ["known"])
    async with Lookup(config) as lookup:
        found = await look_up(lookup, ["stranger-1", "known", "known", "stranger-2"])
        before = await lookup._client.info("commandstats")
        await look_up(lookup, ["stranger-1"] * 100)
        after = await lookup._client.info("commandstats")
    assert [type(each) for each in found] == [UnknownUser, Slate, Slate, UnknownUser]
    assert after["cmdstat_get"]["calls"] - before["cmdstat_get"]["calls"] == 2


async def test_key_of_another_type_fails_its_own_lookup_only(server: LocalValkey) -> None:
    config = Config(redis=RedisConfig(url=server.url))
    await put(config, ["good", "fine"])
    client = await connect(config.redis, config.key_prefix)
    await client.call("LPUSH", client.keys.slate("broken"), "x")
    await client.aclose()
    async with Lookup(config) as lookup:
        good, broken, fine = await look_up(lookup, ["good", "broken", "fine"])
        with pytest.raises(UnicodeEncodeError):
            await asyncio.gather(lookup.slate("half \ud83d"), lookup.slate("good"))
        assert await lookup.slate("good") == make_slate("good")
    assert (good, fine) == (make_slate("good"), make_slate("fine"))
    assert isinstance(broken, StoreError)
    assert "WRONGTYPE" in str(broken)


async def test_hung_server_fails_waiting_lookups_in_time_and_later_ones_succeed(server: LocalValkey) -> None:
    config = Config(redis=RedisConfig(url=server.url, timeout_s=0.5))
    await put(config, ["u"])
    async with Lookup(config) as lookup:
        assert await lookup.slate("u") == make_slate("u")
        os.kill(server.pid, signal.SIGSTOP)
        async with asyncio.timeout(10):
            failed = await look_up(lookup, [f"u{number}" for number in range(1000)])
        os.kill(server.pid, signal.SIGCONT)
        assert Counter(map(type, failed)) == {StoreUnavailable: 1000}
        assert await lookup.slate("u") == make_slate("u")


async def test_cancelled_lookup_leaves_others_of_the_same_user_waiting(server: LocalValkey) -> None:
    config = Config(redis=RedisConfig(url=server.url))
    await put(config, ["u"])
    async with Lookup(config) as lookup:
        given_up, kept = (asyncio.create_task(lookup.slate("u")) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await kept == make_slate("u")


async def test_closing_ends_running_lookups(server: LocalValkey) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    lookup = Lookup(Config(redis=RedisConfig(url=server.url, timeout_s=60)))
    running = asyncio.create_task(lookup.slate("u"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await lookup.aclose()
        with pytest.raises(StoreUnavailable, match="was closed"):
            await running
    os.kill(server.pid, signal.SIGCONT)


async def test_node_of_a_cluster_that_is_down_fails_the_lookups_of_its_users_only(tmp_path: Path) -> None:
    users = [f"u{number}" for number in range(600)]
    async with cluster(tmp_path, nodes=2) as (first, second):
        config = Config(redis=RedisConfig(url=first.url, cluster=True, timeout_s=20))
        await put(config, users)
        async with Lookup(config) as lookup:
            assert await look_up(lookup, users) == [make_slate(user) for user in users]
            second.stop()
            found = await look_up(lookup, users)
    kinds = Counter(map(type, found))
    assert set(kinds) == {Slate, StoreUnavailable}
    assert min(kinds.values()) > 200


async def test_http_queues_lookups_up_to_its_bound_and_refuses_one_more(server: LocalValkey, eventually) -> None:
    config = Config(redis=RedisConfig(url=server.url, timeout_s=20), serve=ServeConfig(max_concurrent_lookups=50))
    await put(config, ["u"])
    transport = httpx.ASGITransport(app=application(config))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        os.kill(server.pid, signal.SIGSTOP)
        requests = [asyncio.create_task(http.get("/v1/slates/u")) for _ in range(60)]
        await eventually(lambda: sum(request.done() for request in requests) == 10)
        os.kill(server.pid, signal.SIGCONT)
        responses = await asyncio.gather(*requests)
        assert (await http.get("/v1/slates/u")).status_code == 200
    refused = [response for response in responses if response.status_code == 503]
    assert Counter(response.status_code for response in responses) == {200: 50, 503: 10}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json() == {"error": "too many lookups at a time; try again"}
