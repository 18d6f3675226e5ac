"""Local servers: free ports, restarts, and an end together with the process that started them."""

import asyncio
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from worker.errors import SourceError, StoreError
from worker.replay.child_process import HOST, PORTS, free_ports
from worker.replay.local_servers import LocalKafka, LocalValkey, missing_requirement

START_VALKEY = """
import sys
from worker.replay.local_servers import LocalValkey
server = LocalValkey(sys.argv[1])
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def test_restarted_valkey_has_its_port_and_no_data(tmp_path: Path) -> None:
    with LocalValkey(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        port = server.port
        client.set("key", "value")
        server.kill()
        assert not is_listening(port)
        server.start()
        assert server.port == port
        assert client.get("key") is None
        client.close()
    assert not is_listening(port)


async def test_server_dies_with_the_process_that_started_it(
    tmp_path: Path, eventually: Callable[..., Awaitable[Any]]
) -> None:
    command = [sys.executable, "-c", START_VALKEY, str(tmp_path)]
    parent = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert parent.stdout is not None
    port = int(await parent.stdout.readline())
    assert is_listening(port)
    parent.kill()
    await parent.communicate()
    await eventually(lambda: not is_listening(port), timeout_s=10)


def test_free_ports_are_distinct_unused_and_below_those_of_clients() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port in PORTS and not is_listening(port) for port in ports)


def test_port_in_use_is_not_free() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((HOST, free_ports(1)[0]))
        server.listen()
        assert server.getsockname()[1] not in free_ports(3)


def test_missing_jars_are_reported_with_the_command_that_installs_them(tmp_path: Path) -> None:
    assert "make kafka" in (missing_requirement(tmp_path) or "")
    with pytest.raises(SourceError, match="make kafka"):
        LocalKafka(tmp_path / "data", home=tmp_path).start()


def test_port_of_a_running_server_is_one_sentence(tmp_path: Path) -> None:
    with (
        LocalValkey(tmp_path / "one") as running,
        pytest.raises(StoreError, match=r"another process listens on .*; choose another port"),
    ):
        LocalValkey(tmp_path / "two", port=running.port).start()


def test_server_that_cannot_start_is_reported_with_its_last_log_line(tmp_path: Path) -> None:
    with socket.socket() as bound:  # does not listen, but the port is taken
        bound.bind((HOST, 0))
        with pytest.raises(StoreError, match=r"did not start on .*Failed listening.*server.log"):
            LocalValkey(tmp_path, port=bound.getsockname()[1]).start()
