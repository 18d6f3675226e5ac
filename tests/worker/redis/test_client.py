"""What becomes of a push when Redis is slow, restarts, fills up, turns read-only, is a cluster, or was never there."""

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pipeline.records import Event
from worker.config import RedisConfig
from worker.config import SequencesConfig as Config
from worker.errors import ConfigError, StoreError, StoreUnavailable
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.redis.client import RedisClient, connect
from worker.redis.sequences import SequenceStore
from worker.replay.local_servers import LocalValkey


class ClusterValkey(LocalValkey):
    """One node of a cluster; it serves once it owns the slots."""

    def _command(self) -> Sequence[str]:
        return [*super()._command(), "--cluster-enabled", "yes"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalValkey]:
    with LocalValkey(tmp_path) as own:
        yield own


def arrivals(count: int, users: int = 1) -> list[ConsumedEvent]:
    record_offset = [RecordOffset(Partition("events", 0), 1, offset) for offset in range(count)]
    return [
        ConsumedEvent(Event(f"u{each.offset % users}", "i", "view", 1), bytes([each.offset]) * 24, each, count, 0, 0.0)
        for each in record_offset
    ]


def test_a_stopped_redis_is_unavailable_after_the_deadline_and_pushing_again_appends_once(server: LocalValkey):
    async def scenario() -> bytes:
        client = await connect(RedisConfig(url=server.url, timeout_s=0.3))
        sequences, batch = SequenceStore(client, Config()), arrivals(3)
        await sequences.push(batch[:1])
        os.kill(server.pid, signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.3 s"):
            await sequences.push(batch[1:])
        assert loop.time() - start_s < 2
        os.kill(server.pid, signal.SIGCONT)  # the push that timed out is carried out now
        await sequences.push(batch[1:])
        value = await client.call("GET", "seq:{u:u0}")
        await client.aclose()
        assert batch[2].ring == value[40:]
        return value[40:]

    assert asyncio.run(asyncio.wait_for(scenario(), 30)) == b"".join(bytes([n]) * 24 for n in range(3))


def test_a_restart_that_lost_all_is_survived_and_noticed(server: LocalValkey):
    async def scenario() -> None:
        client = await connect(RedisConfig(url=server.url))
        sequences, batch = SequenceStore(client, Config()), arrivals(3)
        await sequences.push(batch[:1])
        server.stop()
        with pytest.raises(StoreUnavailable, match="unreachable"):
            await sequences.push(batch[1:2])
        server.start()
        await sequences.push(batch[1:2])  # its functions are gone, too: they are loaded again
        await sequences.push(batch[2:])
        assert batch[2].ring == batch[1].packed + batch[2].packed
        assert sequences.rings_lost == 1
        await client.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_lost_function_is_loaded_again_in_the_same_call(server: LocalValkey):
    async def scenario() -> None:
        client = await connect(RedisConfig(url=server.url))
        await client.call("FUNCTION", "FLUSH")
        batch = arrivals(6, users=3)
        await SequenceStore(client, Config()).push(batch)
        assert all(each.is_new for each in batch)
        await client.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (("CONFIG", "SET", "maxmemory", "1mb"), "out of memory: raise its maxmemory"),
        (("REPLICAOF", "127.0.0.1", "1"), "read-only replica"),
    ],
)
def test_a_server_that_cannot_write_now_is_unavailable_and_says_why(server: LocalValkey, trouble: tuple, says: str):
    async def scenario() -> None:
        client = await connect(RedisConfig(url=server.url))
        await client.call(*trouble)
        with pytest.raises(StoreUnavailable, match=says):
            await SequenceStore(client, Config()).push(arrivals(2))
        await client.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_wrong_credentials_are_no_outage(server: LocalValkey):
    async def scenario() -> None:
        await connect(RedisConfig(url=server.url.replace("//", "//someone:wrong@")))

    with pytest.raises(StoreError, match=r"rejects the credentials") as caught:
        asyncio.run(asyncio.wait_for(scenario(), 30))
    assert not caught.value.retriable
    assert "wrong@" not in str(caught.value)


def test_no_server_at_all_is_unavailable_at_once():
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9 is unreachable"):
        asyncio.run(asyncio.wait_for(connect(RedisConfig(url="redis://127.0.0.1:9/0")), 5))


def test_an_address_that_is_none_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisClient(RedisConfig(url="localhost"))


def test_one_wrong_command_of_a_pipeline_leaves_the_connection_usable(server: LocalValkey):
    async def scenario() -> None:
        client = await connect(RedisConfig(url=server.url))
        with pytest.raises(StoreError, match="WRONGTYPE"):
            await client.pipeline([("SET", "a", "1"), ("LPUSH", "a", "2"), ("SET", "b", "3")])
        assert await client.pipeline([("GET", "a"), ("GET", "b")]) == [b"1", b"3"]
        await client.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_cluster_takes_pushes_of_many_users(tmp_path: Path, eventually):
    async def scenario() -> None:
        alone = RedisClient(RedisConfig(url=server.url))
        await alone.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def formed() -> bool:
            return b"cluster_state:ok" in await alone.call("CLUSTER", "INFO")

        await eventually(formed)
        client = await connect(RedisConfig(url=server.url, cluster=True))
        batch = arrivals(60, users=20)
        await SequenceStore(client, Config()).push(batch)
        assert all(each.is_new for each in batch)
        await alone.call("FUNCTION", "FLUSH")
        await SequenceStore(client, Config()).push(batch)
        assert not any(each.is_new for each in batch)
        assert (await client.info("server"))["tcp_port"] == server.port
        await client.aclose()
        await alone.aclose()

    with ClusterValkey(tmp_path) as server:
        asyncio.run(asyncio.wait_for(scenario(), 30))
