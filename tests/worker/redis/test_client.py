"""Pushes when Redis is slow, restarts, fills up, turns read-only, is a cluster, or was never there."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Event
from tests.tls import self_signed_certificate, tls_server
from tests.worker.redis.clusters import cluster
from worker.config import RedisConfig, SequencesConfig
from worker.errors import ConfigError, StoreError, StoreUnavailable
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.redis.client import RedisClient, connect
from worker.redis.rings.sequences import SequenceStore
from worker.replay.local_servers import LocalValkey


def consumed_events(count: int, users: int = 1) -> list[ConsumedEvent]:
    return [
        ConsumedEvent(
            event=Event(f"u{offset % users}", "i", "view", 1),
            packed=bytes([offset]) * 24,
            record_offset=RecordOffset(Partition("events", 0), 1, offset),
            end_offset=count,
            polled_ms=0,
            polled_s=0.0,
        )
        for offset in range(count)
    ]


async def test_hung_server_times_out_and_the_repeated_push_appends_once(server: LocalValkey):
    client = await connect(RedisConfig(url=server.url, timeout_s=1.0))
    store = SequenceStore(client, SequencesConfig())
    events = consumed_events(3)
    await store.push(events[:1])
    os.kill(server.pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        with pytest.raises(StoreUnavailable, match=r"did not answer within 1 s"):
            await store.push(events[1:])
    os.kill(server.pid, signal.SIGCONT)  # the server now runs the push that timed out
    await store.push(events[1:])
    value = await client.call("GET", "seq:{u:u0}")
    await client.aclose()
    assert events[2].ring == value[40:]
    assert value[40:] == b"".join(bytes([offset]) * 24 for offset in range(3))


async def test_push_continues_after_a_restart_that_lost_all_data(server: LocalValkey, server_client: RedisClient):
    store = SequenceStore(server_client, SequencesConfig())
    events = consumed_events(3)
    await store.push(events[:1])
    server.stop()
    with pytest.raises(StoreUnavailable, match="unreachable"):
        await store.push(events[1:2])
    server.start()
    await store.push(events[1:2])  # the functions are lost, too: they are loaded again
    await store.push(events[2:])
    assert events[2].ring == events[1].packed + events[2].packed
    assert store.rings_lost == 1


async def test_lost_function_is_loaded_again_in_the_same_call(server_client: RedisClient):
    await server_client.call("FUNCTION", "FLUSH")
    events = consumed_events(6, users=3)
    await SequenceStore(server_client, SequencesConfig()).push(events)
    assert all(event.is_new for event in events)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("CONFIG", "SET", "maxmemory", "1mb"), "out of memory: raise its maxmemory"),
        (("REPLICAOF", "127.0.0.1", "1"), "read-only replica"),
    ],
)
async def test_server_that_cannot_write_is_unavailable_with_its_reason(
    server_client: RedisClient, command: tuple, message: str
):
    await server_client.call(*command)
    with pytest.raises(StoreUnavailable, match=message):
        await SequenceStore(server_client, SequencesConfig()).push(consumed_events(2))


async def test_wrong_credentials_are_a_permanent_error(server: LocalValkey):
    with pytest.raises(StoreError, match=r"rejects the credentials") as caught:
        await connect(RedisConfig(url=server.url.replace("//", "//someone:wrong@")))
    assert not caught.value.retriable
    assert "wrong@" not in str(caught.value)


async def test_missing_server_is_unavailable_at_once():
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9 is unreachable"):
            await connect(RedisConfig(url="redis://127.0.0.1:9/0"))


async def connection_error(**settings: Any) -> StoreError:
    with pytest.raises(StoreError) as caught:
        await connect(RedisConfig(**settings))
    return caught.value


async def test_wrong_setting_for_a_server_is_named_with_the_next_step(server: LocalValkey):
    url = server.url
    wrong = {
        "speaks no TLS; write redis:// instead of rediss://": {"url": url.replace("redis:", "rediss:")},
        "set the number at the end of redis.url": {"url": url.replace("/0", "/99")},
        "set its user and password, leave them out where": {"url": url.replace("//", "//:hunter2@")},
        "is not a cluster: set redis.cluster = false": {"url": url, "cluster": True},
    }
    for words, settings in wrong.items():
        error = await connection_error(**settings)
        assert words in str(error)
        assert "hunter2" not in str(error)
        assert not error.retriable
    assert "did not answer" not in str(error)


async def test_node_of_a_cluster_without_the_setting_is_named(tmp_path: Path):
    async with cluster(tmp_path, nodes=2) as (server, _):
        client = await connect(RedisConfig(url=server.url))
        with pytest.raises(StoreError, match=r"is a node of a cluster .*; set redis\.cluster = true"):
            await client.pipeline([("GET", str(number)) for number in range(20)])
        await client.aclose()
    with pytest.raises(ConfigError, match=r"database 1, and a cluster has only 0"):
        RedisClient(RedisConfig(url=server.url.replace("/0", "/1"), cluster=True))


async def test_listener_of_kafka_does_not_speak_redis(kafka: str):
    for scheme in ("redis", "rediss"):
        error = await connection_error(url=f"{scheme}://{kafka}")
        assert f"Redis at {kafka} closes the connection at the first command" in str(error)
        assert "does not speak Redis's protocol" in str(error)
        assert "set redis.url" in str(error)


async def test_listener_that_answers_otherwise_does_not_speak_redis():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        error = await connection_error(url=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    assert "another service listens there; set redis.url" in str(error)
    assert not error.retriable


async def test_tls_that_the_url_does_not_have_or_does_not_trust_is_named(tmp_path: Path):
    async with tls_server(self_signed_certificate(tmp_path)) as address:
        expected = await connection_error(url=f"redis://{address}")
        untrusted = await connection_error(url=f"rediss://{address}")
    assert "speaks TLS; write rediss:// instead of redis://" in str(expected)
    assert "certificate that is not trusted" in str(untrusted)
    assert "set ssl_ca_certs in redis.url" in str(untrusted)


async def test_server_that_is_silent_is_waited_for(server: LocalValkey):
    os.kill(server.pid, signal.SIGSTOP)
    try:
        error = await connection_error(url=server.url, timeout_s=0.3)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert "did not answer within 0.3 s; see its load and its log" in str(error)
    assert error.retriable


def test_invalid_url_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisClient(RedisConfig(url="localhost"))


async def test_failed_command_of_a_pipeline_leaves_the_connection_usable(server_client: RedisClient):
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await server_client.pipeline([("SET", "a", "1"), ("LPUSH", "a", "2"), ("SET", "b", "3")])
    assert await server_client.pipeline([("GET", "a"), ("GET", "b")]) == [b"1", b"3"]


async def test_cluster_accepts_pushes_of_many_users(tmp_path: Path):
    async with cluster(tmp_path, nodes=1) as (server,):
        node = RedisClient(RedisConfig(url=server.url))
        client = await connect(RedisConfig(url=server.url, cluster=True))
        events = consumed_events(60, users=20)
        await SequenceStore(client, SequencesConfig()).push(events)
        assert all(event.is_new for event in events)
        await node.call("FUNCTION", "FLUSH")
        await SequenceStore(client, SequencesConfig()).push(events)
        assert not any(event.is_new for event in events)
        assert (await client.info("server"))["tcp_port"] == server.port
        await client.aclose()
        await node.aclose()


async def test_replies_longer_than_one_read_and_errors_among_them_keep_their_places(client: RedisClient):
    """The socket is read in pieces of 64 KiB: replies come whole, in halves, and many at once."""
    values = [bytes([number % 256]) * size for number, size in enumerate([1, 200_000, 10] * 40)]
    keys = [f"test_replies{number}" for number in range(len(values))]
    await client.pipeline([("SET", key, value) for key, value in zip(keys, values, strict=True)])
    replies = await client.replies([command for key in keys for command in (("GET", key), ("HGET", key, "field"))])
    assert replies[::2] == values
    assert all(isinstance(reply, StoreError) and "WRONGTYPE" in str(reply) for reply in replies[1::2])
    assert await client.call("DEL", *keys) == len(keys)
