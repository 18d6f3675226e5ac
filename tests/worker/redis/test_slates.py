"""Slates in Redis and their lookup: order, expiry, the popular fallback, the command, HTTP."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest

from pipeline.slates import Covers, Latency, Slate, SlateItem
from worker.cli import main
from worker.config import Config, RedisConfig, SlatesConfig
from worker.errors import StoreError, StoreUnavailable, UnknownUser
from worker.lookup.lookup import Lookup
from worker.redis.client import RedisClient, connect
from worker.redis.slates import SlateStore
from worker.replay.child_process import free_ports
from worker.replay.local_servers import LocalValkey

NewUser = Callable[[], str]


def slate(user: str, last_offset: int, partition: int = 0, item: str = "i1") -> Slate:
    return Slate(
        user_id=user,
        items=[SlateItem(item, 0.5, 0.25, None, None, "retrieval")],
        strategy="hstu",
        backend="torch",
        why="best",
        model_version="v1",
        covers=Covers("events", partition, last_offset, last_offset, 1, 5),
        created_ms=1_700_000_000_000,
        latency_ms=Latency(total=1.5),
    )


@pytest.fixture
async def lookup(valkey: str) -> AsyncIterator[Lookup]:
    """A lookup in the session's Valkey."""
    async with Lookup(Config(redis=RedisConfig(url=valkey, prefix=""))) as lookup:
        yield lookup


async def test_slate_is_read_back_and_expires(client: RedisClient, lookup: Lookup, new_user: NewUser):
    users = [new_user() for _ in range(3)]
    await SlateStore(client, SlatesConfig(ttl_days=1)).put([slate(user, 7) for user in users])
    assert await lookup.slate(users[1]) == slate(users[1], 7)
    assert 86_000 < await client.call("TTL", f"rec:{{u:{users[1]}}}") <= 86_400


async def test_older_slate_of_the_same_partition_never_replaces_a_newer_one(
    client: RedisClient, lookup: Lookup, new_user: NewUser
):
    store = SlateStore(client, SlatesConfig())
    user = new_user()
    await store.put([slate(user, 9, item="new"), slate(user, 8, item="old")])
    assert (await lookup.slate(user)).items[0].item_id == "new"
    await store.put([slate(user, 9, item="repeated")])
    assert (await lookup.slate(user)).items[0].item_id == "repeated"
    await store.put([slate(user, 2, partition=1, item="elsewhere")])
    assert (await lookup.slate(user)).items[0].item_id == "elsewhere"


async def test_new_topic_generation_restarts_the_offsets(client: RedisClient, lookup: Lookup, new_user: NewUser):
    user = new_user()
    await SlateStore(client, SlatesConfig(), topic_generation="1").put([slate(user, 900)])
    await SlateStore(client, SlatesConfig(), topic_generation="2").put([slate(user, 3)])
    assert (await lookup.slate(user)).covers.last_offset == 3


async def test_invalid_slate_is_an_error_that_names_the_key(client: RedisClient, lookup: Lookup, new_user: NewUser):
    user = new_user()
    await client.call("SET", f"rec:{{u:{user}}}", "nonsense")
    with pytest.raises(StoreError, match=user):
        await lookup.slate(user)


async def test_slate_stored_before_slates_named_their_backend_is_still_read(
    client: RedisClient, lookup: Lookup, new_user: NewUser
):
    user = new_user()
    await SlateStore(client, SlatesConfig()).put([slate(user, 7)])
    value = await client.call("GET", f"rec:{{u:{user}}}")
    older = value.replace(b'"backend":"torch","why":"best",', b"")
    assert len(older) < len(value)
    await client.call("SET", f"rec:{{u:{user}}}", older)
    assert await lookup.slate(user) == msgspec.structs.replace(slate(user, 7), backend="unknown", why="unknown")


async def test_key_that_holds_no_slate_is_replaced(client: RedisClient, new_user):
    user = new_user()
    await client.call("LPUSH", f"rec:{{u:{user}}}", "x")
    await SlateStore(client, SlatesConfig()).put([slate(user, 7)])
    assert await client.call("TYPE", f"rec:{{u:{user}}}") == b"string"


async def test_popular_slate_answers_unknown_users_and_is_replaced_only_by_a_later_one(
    server: LocalValkey, server_client: RedisClient
):
    store = SlateStore(server_client, SlatesConfig())
    popular = msgspec.structs.replace(slate("", -1), strategy="popular")
    async with Lookup(Config(redis=RedisConfig(url=server.url, prefix=""))) as lookup:
        with pytest.raises(UnknownUser, match="'stranger'"):
            await lookup.slate("stranger")
        await store.put_popular(popular, as_of_ms=2_000)
        await store.put_popular(msgspec.structs.replace(popular, items=[]), as_of_ms=1_000)
        assert await lookup.slate("stranger") == msgspec.structs.replace(popular, user_id="stranger")


def test_lookup_command_prints_a_slate_and_exits_44_for_an_unknown_user(run, server: LocalValkey, capsys, monkeypatch):
    async def put_slate() -> None:
        client = await connect(RedisConfig(url=server.url))
        await SlateStore(client, SlatesConfig()).put([slate("u 1", 7, item="the item")])
        await client.aclose()

    run(put_slate())
    monkeypatch.setenv("MILLRACE__REDIS__URL", server.url)
    monkeypatch.setenv("MILLRACE__REDIS__PREFIX", "")
    assert main(["lookup", "u 1", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Slate) == slate("u 1", 7, item="the item")
    assert main(["lookup", "u 1"]) == 0
    table = capsys.readouterr().out
    assert "u 1: hstu on torch (best), model v1" in table
    assert "the item" in table
    assert main(["lookup", "stranger"]) == 44
    assert "no slate for user 'stranger'" in capsys.readouterr().err


async def test_http_serves_slates_errors_and_health_and_stops_on_sigterm(
    server: LocalValkey, server_client: RedisClient, eventually
):
    await SlateStore(server_client, SlatesConfig()).put([slate("a/b c?", 7)])
    async with serving(server.url) as (process, http):
        await eventually(lambda: is_ready(http))
        response = await http.get("/v1/slates/a%2Fb%20c%3F")
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
        assert msgspec.json.decode(response.content, type=Slate) == slate("a/b c?", 7)
        unknown_user = await http.get("/v1/slates/stranger")
        assert unknown_user.status_code == 404
        assert unknown_user.json() == {"error": "no slate for this user, and no popular one yet"}
        server.stop()
        without_redis = await http.get("/v1/slates/a%2Fb%20c%3F")
        assert (without_redis.status_code, (await http.get("/readyz")).status_code) == (503, 503)
        assert without_redis.json() == {"error": "slates cannot be read at present; try again"}
        assert without_redis.headers["retry-after"] == "1"
        assert (await http.get("/livez")).status_code == 200
        server.start()
        assert (await http.get("/readyz")).status_code == 200
        process.terminate()
        assert await process.wait() == 0


def test_serve_reports_an_address_that_it_cannot_listen_on(capsys):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"millrace serve: cannot listen on 127.0.0.1:{port}: " in capsys.readouterr().err
    assert main(["serve", "--host", "nowhere.invalid", "--port", "0"]) == 2
    assert "millrace serve: cannot listen on nowhere.invalid:0: " in capsys.readouterr().err


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """Run `millrace serve` as a child process."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "worker.cli", "serve", "--port", str(port)]
    settings = {"MILLRACE__REDIS__URL": url, "MILLRACE__REDIS__PREFIX": ""}
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | settings)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            yield process, http
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.ConnectError:
        return False


async def test_lookup_without_a_server_is_unavailable():
    async with asyncio.timeout(20), Lookup(Config(redis=RedisConfig(url="redis://127.0.0.1:9/0", prefix=""))) as lookup:
        with pytest.raises(StoreUnavailable):
            await lookup.slate("u1")
