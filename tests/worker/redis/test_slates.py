"""Slates in Redis and what looks them up: order, expiry, the popular fallback, the command, HTTP."""

import asyncio
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest

from pipeline.records import Covers, Latency, Slate, SlateItem
from worker.cli import main
from worker.config import RedisConfig, SlatesConfig
from worker.errors import StoreError, StoreUnavailable, UnknownUser
from worker.lookup.lookup import Lookup
from worker.redis.client import RedisClient, connect
from worker.redis.slates import SlateStore
from worker.replay.child_process import free_ports
from worker.replay.local_servers import LocalValkey

names = (f"reader{number}" for number in itertools.count())


def slate(user: str, last_offset: int, partition: int = 0, item: str = "i1") -> Slate:
    items = [SlateItem(item, 0.5, 0.25, None, None, "retrieval")]
    covers = Covers("events", partition, last_offset, last_offset, 1, 5)
    return Slate(user, items, "hstu", "v1", covers, 1_700_000_000_000, Latency(total=1.5))


def scenario(url: str, test: Callable[[RedisClient, Lookup], Awaitable[None]]) -> None:
    async def within() -> None:
        client = await connect(RedisConfig(url=url))
        try:
            async with Lookup(RedisConfig(url=url)) as lookup:
                await test(client, lookup)
        finally:
            await client.aclose()

    asyncio.run(asyncio.wait_for(within(), 30))


def test_a_slate_comes_back_as_it_was_put_and_expires(valkey: str):
    async def test(client: RedisClient, lookup: Lookup) -> None:
        users = [next(names) for _ in range(3)]
        await SlateStore(client, SlatesConfig(ttl_days=1)).put([slate(user, 7) for user in users])
        assert await lookup.slate(users[1]) == slate(users[1], 7)
        assert 86_000 < await client.call("TTL", f"rec:{{u:{users[1]}}}") <= 86_400

    scenario(valkey, test)


def test_an_older_slate_of_the_same_partition_never_replaces_a_newer_one(valkey: str):
    async def test(client: RedisClient, lookup: Lookup) -> None:
        store, user = SlateStore(client, SlatesConfig()), next(names)
        await store.put([slate(user, 9, item="new"), slate(user, 8, item="old")])
        assert (await lookup.slate(user)).items[0].item_id == "new"
        await store.put([slate(user, 9, item="repeated")])
        assert (await lookup.slate(user)).items[0].item_id == "repeated"
        await store.put([slate(user, 2, partition=1, item="elsewhere")])
        assert (await lookup.slate(user)).items[0].item_id == "elsewhere"

    scenario(valkey, test)


def test_a_new_epoch_begins_its_offsets_anew(valkey: str):
    async def test(client: RedisClient, lookup: Lookup) -> None:
        user = next(names)
        await SlateStore(client, SlatesConfig(), topic_generation="1").put([slate(user, 900)])
        await SlateStore(client, SlatesConfig(), topic_generation="2").put([slate(user, 3)])
        assert (await lookup.slate(user)).covers.last_offset == 3

    scenario(valkey, test)


def test_what_is_no_slate_is_an_error_that_names_the_key(valkey: str):
    async def test(client: RedisClient, lookup: Lookup) -> None:
        user = next(names)
        await client.call("SET", f"rec:{{u:{user}}}", "nonsense")
        with pytest.raises(StoreError, match=user):
            await lookup.slate(user)

    scenario(valkey, test)


@pytest.fixture
def server(tmp_path):
    with LocalValkey(tmp_path) as own:
        yield own


def test_the_popular_slate_answers_whom_nobody_knows_and_only_a_later_one_replaces_it(server: LocalValkey):
    async def test(client: RedisClient, lookup: Lookup) -> None:
        with pytest.raises(UnknownUser, match="'stranger'"):
            await lookup.slate("stranger")
        store = SlateStore(client, SlatesConfig())
        popular = msgspec.structs.replace(slate("", -1), strategy="popular")
        await store.put_popular(popular, as_of_ms=2_000)
        await store.put_popular(msgspec.structs.replace(popular, items=[]), as_of_ms=1_000)
        assert await lookup.slate("stranger") == msgspec.structs.replace(popular, user_id="stranger")

    scenario(server.url, test)


def test_the_command_prints_a_slate_and_exits_44_for_a_stranger(server: LocalValkey, capsys, monkeypatch):
    async def test(client: RedisClient, _: Lookup) -> None:
        await SlateStore(client, SlatesConfig()).put([slate("u 1", 7, item="the item")])

    monkeypatch.setenv("MILLRACE__REDIS__URL", server.url)
    scenario(server.url, test)
    assert main(["lookup", "u 1", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Slate) == slate("u 1", 7, item="the item")
    assert main(["lookup", "u 1"]) == 0
    assert "the item" in capsys.readouterr().out
    assert main(["lookup", "stranger"]) == 44
    assert "no slate for user 'stranger'" in capsys.readouterr().err


def test_http_answers_slates_unknown_users_its_health_and_stops_when_told(server: LocalValkey, eventually):
    async def test(client: RedisClient, _: Lookup) -> None:
        await SlateStore(client, SlatesConfig()).put([slate("a/b c?", 7)])
        async with serving(server.url) as (process, http):
            await eventually(lambda: answers(http))
            found = await http.get("/v1/slates/a%2Fb%20c%3F")
            assert (found.status_code, found.headers["content-type"]) == (200, "application/json")
            assert msgspec.json.decode(found.content, type=Slate) == slate("a/b c?", 7)
            stranger = await http.get("/v1/slates/stranger")
            assert stranger.status_code == 404
            assert "no slate for user 'stranger'" in stranger.json()["error"]
            server.stop()
            away = await http.get("/v1/slates/a%2Fb%20c%3F")
            assert (away.status_code, (await http.get("/readyz")).status_code) == (503, 503)
            assert "is unreachable" in away.json()["error"]
            assert (await http.get("/livez")).status_code == 200
            server.start()
            assert (await http.get("/readyz")).status_code == 200
            process.terminate()
            assert await process.wait() == 0

    scenario(server.url, test)


def test_an_address_that_http_cannot_have_is_one_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"millrace serve: cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err
    assert main(["serve", "--host", "nowhere.invalid", "--port", "0"]) == 2
    assert "millrace serve: cannot listen on nowhere.invalid:0: " in capsys.readouterr().err


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """`millrace serve` as a process of its own."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "worker.cli", "serve", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, "MILLRACE__REDIS__URL": url})
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            yield process, http
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def answers(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.ConnectError:
        return False


def test_a_lookup_without_a_server_is_unavailable():
    async def find() -> None:
        async with Lookup(RedisConfig(url="redis://127.0.0.1:9/0")) as lookup:
            await lookup.slate("u1")

    with pytest.raises(StoreUnavailable):
        asyncio.run(asyncio.wait_for(find(), 5))
