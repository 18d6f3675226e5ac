"""Model swaps under a steady load, with broker, Valkey, load and consumer on the same cores.

The load is half of what the same worker reached in this run on a topic with one event per user. Two models of one log,
trained with two seeds, take turns behind a symlink; each is validated as any new artifact is. A slate's latency runs
from its event's creation to a consumer's hands. "During" are events created between a change of the symlink and AFTER_S
after the first slate of the new model, which includes the wait for the next check, loading and validation. "Before" is
BEFORE_S without a change.

usage: python -m tests.benchmarks.swap [--swaps 20] [--users 60000] [--out DIR]
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer
from rich.console import Console

from pipeline.records import Event
from tests.artifacts import point
from tests.benchmarks import results
from tests.benchmarks.load import Shoppers
from tests.benchmarks.replay import every_record
from tests.benchmarks.stage import WORKER, Settings, Stage, resident_kib, stage
from tests.benchmarks.stream import (
    WARM_UP_EVENTS,
    WARM_UP_S,
    fill_rings,
    fill_topic,
    read_item_ids,
    read_slates,
    throughput,
    train_model,
)
from tests.oracle import Oracle
from worker import config_file
from worker.replay.feed import at_rate, produce

POLL_INTERVAL_S = 1.0  # of the worker, for a new artifact
BEFORE_S = 40.0
AFTER_S = 2.0
QUANTILES = (50, 95, 99)
NAME = "swap"
console = Console()


@dataclass
class ReceivedSlates:
    """Columns over all slates that the consumer has read, in their order."""

    created_ms: list[float] = field(default_factory=list)  # creation of the covered event
    latency_ms: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    events: int = 0  # covered

    async def read(self, consumer: AIOKafkaConsumer) -> None:
        """Read until cancelled."""
        async for now_ms, slates in read_slates(consumer, float("inf")):
            self.created_ms += [slate.covers.oldest_ts_ms for slate in slates]
            self.latency_ms += [now_ms - slate.covers.oldest_ts_ms for slate in slates]
            self.versions += [slate.model_version for slate in slates]
            self.events += sum(slate.covers.count for slate in slates)

    def latencies(self, *windows: tuple[float, float]) -> np.ndarray:
        """Return the latencies of events that were created in one of these windows, in milliseconds since 1970."""
        created = np.array(self.created_ms)
        inside = np.any([(start <= created) & (created < end) for start, end in windows], axis=0)
        return np.array(self.latency_ms)[inside]

    async def wait_for(self, events: int) -> None:
        """Wait until this many events are covered. TimeoutError after a minute."""
        async with asyncio.timeout(60):
            while self.events < events:  # noqa: ASYNC110 - the counter is the condition
                await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Swap:
    """One change of the symlink."""

    linked_ms: float
    served_ms: float  # the first slate of the new model was read
    end_ms: float
    rss_kib: int

    @property
    def window(self) -> tuple[float, float]:
        return self.linked_ms, self.end_ms


def train_models(folder: Path) -> list[Path]:
    """Train two models of the default shape, with two seeds."""
    first = train_model(folder)
    second = folder / "other"
    train = ["train", str(folder / "shop" / "events.jsonl"), "--out", str(second), "--epochs", "1", "--seed", "1"]
    subprocess.run([sys.executable, "-m", "worker.cli", *train], check=True, capture_output=True)
    return [first, second]


def read_version(artifact: Path) -> str:
    return msgspec.json.decode((artifact / "manifest.json").read_bytes())["version"]


class Load:
    """Endless events that can be stopped."""

    def __init__(self, shoppers: Shoppers) -> None:
        self._shoppers = shoppers
        self.stopped = False

    def events(self) -> Iterator[Event]:
        for event in self._shoppers.events():
            if self.stopped:
                return
            yield event


async def publish(link: Path, artifact: Path, received: ReceivedSlates, pid: int) -> Swap:
    """Publish a model, and wait until it has served for AFTER_S."""
    version = read_version(artifact)
    read_before = len(received.versions)
    linked_ms = time.time_ns() / 1e6
    point(link, artifact)
    async with asyncio.timeout(60):
        while version not in received.versions[read_before:]:  # noqa: ASYNC110 - the slates are the condition
            await asyncio.sleep(0.01)
    served_ms = time.time_ns() / 1e6
    await asyncio.sleep(AFTER_S)
    return Swap(linked_ms, served_ms, time.time_ns() / 1e6, resident_kib(pid))


async def swap_under_load(
    stage: Stage, settings: Settings, shoppers: Shoppers, rate: float, link: Path, models: list[Path]
) -> tuple[ReceivedSlates, float, list[Swap]]:
    """Return the slates, when the time before the first swap began, and one swap per model, in turn."""
    load = Load(shoppers)
    received = ReceivedSlates()
    await stage.create_topics(NAME)
    consumer = AIOKafkaConsumer(f"{NAME}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
    async with consumer:
        with stage.process(WORKER, NAME, settings) as worker:
            reading = asyncio.create_task(received.read(consumer))
            await fill_topic(stage, NAME, shoppers.events(), WARM_UP_EVENTS)
            await received.wait_for(WARM_UP_EVENTS)
            kafka = config_file.load(None, stage.environment(NAME, {})).kafka
            producing = asyncio.create_task(produce(kafka, load.events(), at_rate(rate)))
            await asyncio.sleep(WARM_UP_S)
            began_ms = time.time_ns() / 1e6
            await asyncio.sleep(BEFORE_S)
            swaps = [await publish(link, model, received, worker.pid) for model in models]
            load.stopped = True
            await received.wait_for(WARM_UP_EVENTS + await producing)
            reading.cancel()
    return received, began_ms, swaps


async def count_lost(stage: Stage) -> int:
    """Count the events that no slate covers. AssertionError when a user's slates contradict the oracle."""
    oracle = Oracle(f"{NAME}.events", cap=1)
    async for record in every_record(stage.bootstrap, f"{NAME}.events"):
        oracle.feed(record.partition, record.offset, msgspec.json.decode(record.value))
    slates = [msgspec.json.decode(record.value) async for record in every_record(stage.bootstrap, f"{NAME}.slates")]
    lost = len(oracle.lost(slates))
    if not lost:
        oracle.check_slates(slates)
    return lost


async def measure(swaps: int, users: int, out: Path) -> None:
    with stage() as servers:
        first, second = train_models(servers.folder)
        link = servers.folder / "current"
        point(link, first)
        shoppers = Shoppers(users, read_item_ids(first))
        settings: Settings = {
            "PIPELINE__ARTIFACT": link,
            "PIPELINE__THREADS": 1,
            "PIPELINE__ARTIFACT_POLL_INTERVAL_S": POLL_INTERVAL_S,
        }
        await fill_rings(servers, shoppers, settings)
        full_rate, _ = await throughput(servers, "full-rate", WORKER, settings, shoppers.events(), users)
        models = list(islice(cycle([second, first]), swaps))
        received, began_ms, done = await swap_under_load(servers, settings, shoppers, full_rate / 2, link, models)
        lost = await count_lost(servers)
    report(received, began_ms, done, lost, full_rate / 2, out)


def report(received: ReceivedSlates, began_ms: float, swaps: list[Swap], lost: int, rate: float, out: Path) -> None:
    before = received.latencies((began_ms, swaps[0].linked_ms))
    during = received.latencies(*(swap.window for swap in swaps))
    p99_before, p99_during = (float(np.percentile(latencies, 99)) for latencies in (before, during))
    metrics = {
        "swaps": len(swaps),
        "lost": lost,
        "slates_per_s": rate,
        "p99_ms_before": p99_before,
        "p99_ms_during": p99_during,
        "p99_ratio": p99_during / p99_before,
        "rss_growth_pct": 100 * (swaps[-1].rss_kib / swaps[min(1, len(swaps) - 1)].rss_kib - 1),
    }
    rows: list[dict[str, results.Cell]] = [{"swap": 0, "events": len(before), **percentiles(before)}]
    rows += [
        {
            "swap": number,
            "until_served_ms": round(swap.served_ms - swap.linked_ms, 1),
            **percentiles(received.latencies(swap.window)),
            "rss_mib": round(swap.rss_kib / 1024, 1),
        }
        for number, swap in enumerate(swaps, 1)
    ]
    path = results.write(NAME, {name: round(value, 3) for name, value in metrics.items()}, rows, out)
    console.print(metrics, f"written: {path}")


def percentiles(latencies: np.ndarray) -> dict[str, results.Cell]:
    return {f"p{q}_ms": round(float(np.percentile(latencies, q)), 1) for q in QUANTILES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20, help="number of swaps (default 20)")
    users_help = "number of users; far more than events in flight, or slates coalesce (default 60000)"
    parser.add_argument("--users", type=int, default=60_000, help=users_help)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of swap.json")
    args = parser.parse_args()
    asyncio.run(measure(args.swaps, args.users, args.out))


if __name__ == "__main__":
    main()
