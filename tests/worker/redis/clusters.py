"""A real Valkey cluster on this machine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from worker.config import RedisConfig
from worker.redis.client import RedisClient
from worker.replay.local_servers import LocalValkey

SLOTS = 16384
FORMED_S = 30.0


class ClusterValkey(LocalValkey):
    """One node of a cluster. The others' keys are served while it is down."""

    def _command(self) -> Sequence[str]:
        return [*super()._command(), "--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"]


@asynccontextmanager
async def cluster(folder: Path, nodes: int) -> AsyncIterator[list[ClusterValkey]]:
    """The nodes of a cluster that share the slots out evenly."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ClusterValkey(folder / f"node-{number}")) for number in range(nodes)]
        clients = [RedisClient(RedisConfig(url=server.url)) for server in servers]
        for number, client in enumerate(clients):
            first, after = (SLOTS * each // nodes for each in (number, number + 1))
            await client.call("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
            await client.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            await client.call("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        async with asyncio.timeout(FORMED_S):
            while not all([await _is_formed(client, nodes) for client in clients]):  # noqa: ASYNC110 - a cluster cannot notify
                await asyncio.sleep(0.02)
        for client in clients:
            await client.aclose()
        yield servers


async def _is_formed(client: RedisClient, nodes: int) -> bool:
    info = await client.call("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and f"cluster_size:{nodes}\r".encode() in info
