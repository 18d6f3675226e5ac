import os
import signal
import socket
import subprocess
import sys

import pytest
import redis

from worker.errors import SourceError, StoreError
from worker.replay.child_process import HOST, PORTS, free_ports
from worker.replay.local_servers import LocalKafka, LocalValkey, missing_requirement

ORPHAN = """
import sys, time
from worker.replay.local_servers import LocalValkey
server = LocalValkey(sys.argv[1])
server.start()
print(server.port, flush=True)
sys.stdin.read()
"""


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def test_a_restarted_valkey_has_its_port_and_no_data(tmp_path):
    with LocalValkey(tmp_path) as server:
        client, port = redis.Redis.from_url(server.url), server.port
        client.set("key", "value")
        server.kill()
        assert not answers(port)
        server.start()
        assert server.port == port
        assert client.get("key") is None
        client.close()
    assert not answers(port)


def test_a_server_dies_with_the_process_that_started_it(tmp_path, run, eventually):
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    assert answers(port)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()

    async def gone() -> bool:
        return await eventually(lambda: not answers(port), timeout_s=10)

    assert run(gone())


def test_ports_are_free_distinct_and_below_those_that_clients_use():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(port in PORTS and not answers(port) for port in ports)


def test_a_taken_port_is_not_free():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((HOST, free_ports(1)[0]))
        taken.listen()
        assert taken.getsockname()[1] not in free_ports(3)


def test_missing_jars_are_named_with_the_command_that_brings_them(tmp_path):
    assert "make kafka" in (missing_requirement(tmp_path) or "")
    with pytest.raises(SourceError, match="make kafka"):
        LocalKafka(tmp_path / "data", home=tmp_path).start()


def test_a_port_that_somebody_has_is_one_sentence(tmp_path):
    with (
        LocalValkey(tmp_path / "one") as running,
        pytest.raises(StoreError, match=r"somebody else answers on .*; choose another port"),
    ):
        LocalValkey(tmp_path / "two", port=running.port).start()


def test_a_server_that_cannot_start_says_its_last_words(tmp_path):
    with socket.socket() as bound:  # nobody answers, and yet the port cannot be had
        bound.bind((HOST, 0))
        with pytest.raises(StoreError, match=r"did not come up on .*Failed listening.*server.log"):
            LocalValkey(tmp_path, port=bound.getsockname()[1]).start()
