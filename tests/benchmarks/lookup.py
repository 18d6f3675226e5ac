"""Bursts of lookups: how long each takes when hundreds or thousands of users are looked up at once.

A Valkey of its own holds slates of ten items. `library` starts all lookups of a burst at once in this process, by one
`Lookup`; `http` sends one request per connection to `millrace serve`, a process of its own. A latency is the time from
the burst's start to its answer, so the last ones include the queue; for HTTP it includes the connection and this
process's own work as the client, which shares the machine with the servers. The first burst of each kind and size is
not counted. failed: answers that are not the user's slate.

usage: python -m tests.benchmarks.lookup [--out FOLDER] [--bursts 20] [--quick]
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from pipeline.slates import Covers, Latency, Slate, SlateItem
from tests.benchmarks import results
from worker.config import Config, RedisConfig, SlatesConfig
from worker.errors import MillraceError
from worker.lookup.lookup import Lookup
from worker.redis.client import connect
from worker.redis.slates import SlateStore
from worker.replay.child_process import HOST, free_ports
from worker.replay.local_servers import LocalValkey

SIZES = (400, 2000)  # lookups per burst
FIGURES = ("p50_ms", "p99_ms", "failed")
START_S = 30.0
LookUp = Callable[[str], Awaitable[bool]]  # whether the answer is the user's slate


def make_slate(user: str) -> Slate:
    items = [SlateItem(f"item-{number}-of-{user}", 0.5, 0.25, 0.125, 0.0625, "retrieval") for number in range(10)]
    covers = Covers("events", 0, 1, 1, 1, 5)
    return Slate(
        user_id=user,
        items=items,
        strategy="hstu",
        backend="torch",
        why="best",
        model_version="v1",
        covers=covers,
        created_ms=1,
        latency_ms=Latency(total=1.5),
    )


async def fill(url: str, users: Sequence[str]) -> None:
    client = await connect(RedisConfig(url=url), Config().key_prefix)
    await SlateStore(client, SlatesConfig()).put([make_slate(user) for user in users])
    await client.aclose()


async def burst(look_up: LookUp, users: Sequence[str]) -> tuple[list[float], int]:
    """Return each lookup's latency in milliseconds, and the number that failed."""
    start_s = time.perf_counter()

    async def one(user: str) -> tuple[float, bool]:
        found = await look_up(user)
        return 1e3 * (time.perf_counter() - start_s), found

    answers = await asyncio.gather(*map(one, users))
    return [ms for ms, _ in answers], sum(not found for _, found in answers)


def by_library(lookup: Lookup) -> LookUp:
    async def look_up(user: str) -> bool:
        try:
            return await lookup.slate(user) == make_slate(user)
        except MillraceError:
            return False

    return look_up


def by_http(port: int) -> LookUp:
    async def look_up(user: str) -> bool:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(f"GET /v1/slates/{user} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode())
        status, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return status.startswith(b"HTTP/1.1 200 ") and msgspec.json.decode(body)["user_id"] == user

    return look_up


@asynccontextmanager
async def serving(url: str) -> AsyncIterator[int]:
    """`millrace serve` as a child process; yields its port."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "worker.cli", "serve", "--port", str(port)]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, "MILLRACE__REDIS__URL": url})
    try:
        async with asyncio.timeout(START_S):
            while not await _accepts(port):  # noqa: ASYNC110 - a process cannot notify
                await asyncio.sleep(0.05)
        yield port
    finally:
        process.terminate()
        await process.wait()


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True


async def measure(name: str, look_up: LookUp, bursts: int) -> list[dict[str, results.Cell]]:
    rows: list[dict[str, results.Cell]] = []
    for size in SIZES:
        users = [f"u{number}" for number in range(size)]
        await burst(look_up, users)
        measured = [await burst(look_up, users) for _ in range(bursts)]
        latencies = [ms for all_ms, _ in measured for ms in all_ms]
        p50_ms, p99_ms = (round(float(np.percentile(latencies, q)), 1) for q in (50, 99))
        failed = sum(count for _, count in measured)
        row = {"by": name, "lookups": size, "bursts": bursts, "p50_ms": p50_ms, "p99_ms": p99_ms}
        rows.append(row | {"max_ms": round(max(latencies), 1), "failed": failed})
        print(rows[-1], flush=True)
    return rows


async def benchmark(bursts: int) -> list[dict[str, results.Cell]]:
    with TemporaryDirectory() as folder, LocalValkey(folder) as server:
        await fill(server.url, [f"u{number}" for number in range(max(SIZES))])
        async with Lookup(Config(redis=RedisConfig(url=server.url))) as lookup:
            rows = await measure("library", by_library(lookup), bursts)
        async with serving(server.url) as port:
            return rows + await measure("http", by_http(port), bursts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the result (default: results)")
    parser.add_argument("--bursts", type=int, default=20, help="bursts per kind and size (default: 20)")
    parser.add_argument("--quick", action="store_true", help="two bursts: a check that the benchmark runs")
    args = parser.parse_args()
    rows = asyncio.run(benchmark(2 if args.quick else args.bursts))
    metrics = {f"{row['by']}_{row['lookups']}_{name}": float(str(row[name])) for row in rows for name in FIGURES}
    print(results.write("lookup", metrics, rows, args.out))


if __name__ == "__main__":
    main()
