"""Twenty models exchanged under a steady load, everything real and on the same cores: broker, Valkey, load, consumer.

The load is half of what the same worker reached in this run on a topic with one event of every user. Two models of one
log, trained from two seeds, take turns behind a symlink, each judged as any new artifact is. A slate's latency runs
from its event's creation to a consumer's hands. During: events created between a turn of the symlink and AFTER_S after
the first slate of the new model, so the wait for the next look, loading and judging are all in it. Before: BEFORE_S
without a turn.

usage: python -m tests.benchmarks.swap [--swaps 20] [--users 60000]
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
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
from tests.benchmarks.stage import WORKER, Stage, resident_kib, stage
from tests.benchmarks.stream import (
    WAKING_EVENTS,
    WARM_S,
    answers,
    fill_rings,
    fill_topic,
    make_artifact,
    throughput,
)
from tests.oracle import Oracle
from worker import config
from worker.replay.feed import at_rate, produce

FOLLOW_S, BEFORE_S, AFTER_S = 1.0, 40.0, 2.0
NAME = "swap"
console = Console()


@dataclass
class Heard:
    """What a consumer of the slates has: of each, in their order."""

    created_ms: list[float] = field(default_factory=list)  # the covered event's creation
    latency_ms: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    events: int = 0

    async def listen(self, consumer: AIOKafkaConsumer) -> None:
        async for now_ms, read in answers(consumer, float("inf")):
            self.created_ms += [slate.covers.oldest_ts_ms for slate in read]
            self.latency_ms += [now_ms - slate.covers.oldest_ts_ms for slate in read]
            self.versions += [slate.model_version for slate in read]
            self.events += sum(slate.covers.count for slate in read)

    def within(self, *windows: tuple[float, float]) -> np.ndarray:
        """Latencies of the events that were created in one of these spans of milliseconds."""
        created = np.array(self.created_ms)
        inside = np.any([(start <= created) & (created < end) for start, end in windows], axis=0)
        return np.array(self.latency_ms)[inside]


@dataclass(frozen=True)
class Swap:
    """A turn of the symlink."""

    turned_ms: float
    served_ms: float  # the first slate of the new model was read
    end_ms: float
    rss_kib: int

    @property
    def window(self) -> tuple[float, float]:
        return self.turned_ms, self.end_ms


def make_models(folder: Path) -> list[Path]:
    """Two of the default shape, from two seeds."""
    first, second = make_artifact(folder), folder / "other"
    train = ["train", str(folder / "shop" / "events.jsonl"), "--out", str(second), "--epochs", "1", "--seed", "1"]
    subprocess.run([sys.executable, "-m", "worker.cli", *train], check=True, capture_output=True)
    return [first, second]


def version_of(artifact: Path) -> str:
    return msgspec.json.decode((artifact / "manifest.json").read_bytes())["version"]


class Load:
    """Events at a rate, until it is enough."""

    def __init__(self, shoppers: Shoppers) -> None:
        self._shoppers, self.enough = shoppers, False

    def events(self) -> Iterator[Event]:
        for event in self._shoppers.events():
            if self.enough:
                return
            yield event


async def turn(link: Path, artifact: Path, heard: Heard, pid: int) -> Swap:
    """Publish a model, and wait until it has served for AFTER_S."""
    version, known, turned_ms = version_of(artifact), len(heard.versions), time.time_ns() / 1e6
    point(link, artifact)
    async with asyncio.timeout(60):
        while version not in heard.versions[known:]:  # noqa: ASYNC110 - the slates are the condition
            await asyncio.sleep(0.01)
    served_ms = time.time_ns() / 1e6
    await asyncio.sleep(AFTER_S)
    return Swap(turned_ms, served_ms, time.time_ns() / 1e6, resident_kib(pid))


async def under_load(
    stage: Stage, settings: dict[str, object], shoppers: Shoppers, rate: float, link: Path, models: list[Path]
) -> tuple[Heard, float, list[Swap]]:
    """(what was heard, when the time before began, the swaps), one for each of `models` in turn."""
    load, heard, swaps = Load(shoppers), Heard(), []
    await stage.create_topics(NAME)
    consumer = AIOKafkaConsumer(f"{NAME}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
    async with consumer:
        with stage.process(WORKER, NAME, settings) as worker:
            listening = asyncio.create_task(heard.listen(consumer))
            await fill_topic(stage, NAME, shoppers.events(), WAKING_EVENTS)
            await _heard(heard, WAKING_EVENTS)
            kafka = config.load(None, stage.environment(NAME, {})).kafka
            producing = asyncio.create_task(produce(kafka, load.events(), at_rate(rate)))
            await asyncio.sleep(WARM_S)
            began_ms = time.time_ns() / 1e6
            await asyncio.sleep(BEFORE_S)
            for model in models:
                swaps.append(await turn(link, model, heard, worker.pid))
            load.enough = True
            await _heard(heard, WAKING_EVENTS + await producing)
            listening.cancel()
    return heard, began_ms, swaps


async def _heard(heard: Heard, events: int) -> None:
    async with asyncio.timeout(60):
        while heard.events < events:  # noqa: ASYNC110 - the counter is the condition
            await asyncio.sleep(0.05)


async def lost(stage: Stage) -> int:
    """Events in the topic that no slate covers; AssertionError where a user's slates contradict the oracle."""
    oracle, slates = Oracle(f"{NAME}.events", cap=1), []
    async for record in every_record(stage.bootstrap, f"{NAME}.events"):
        oracle.feed(record.partition, record.offset, msgspec.json.decode(record.value))
    async for record in every_record(stage.bootstrap, f"{NAME}.slates"):
        slates.append(msgspec.json.decode(record.value))
    missing = len(oracle.lost(slates))
    if not missing:
        oracle.check_slates(slates)
    return missing


async def measure(swaps: int, users: int) -> None:
    with stage() as set_up:
        first, second = make_models(set_up.folder)
        link = set_up.folder / "current"
        point(link, first)
        items = msgspec.msgpack.decode((first / "vocabulary.msgpack").read_bytes(), type=list[str])
        shoppers = Shoppers(users, items)
        settings: dict[str, object] = {
            "PIPELINE__ARTIFACT": link, "PIPELINE__THREADS": 1, "PIPELINE__ARTIFACT_POLL_INTERVAL_S": FOLLOW_S
        }  # fmt: skip
        await fill_rings(set_up, shoppers, settings)
        most, _ = await throughput(set_up, "most", WORKER, settings, shoppers.events(), users)
        turns = [model for model, _ in zip(cycle([second, first]), range(swaps), strict=False)]
        heard, began_ms, done = await under_load(set_up, settings, shoppers, most / 2, link, turns)
        missing = await lost(set_up)
    report(heard, began_ms, done, missing, most / 2)


def report(heard: Heard, began_ms: float, swaps: list[Swap], missing: int, rate: float) -> None:
    before = heard.within((began_ms, swaps[0].turned_ms))
    during = heard.within(*(swap.window for swap in swaps))
    p99_before, p99_during = (float(np.percentile(taken, 99)) for taken in (before, during))
    metrics = {
        "swaps": len(swaps),
        "lost": missing,
        "slates_per_s": rate,
        "p99_ms_before": p99_before,
        "p99_ms_during": p99_during,
        "p99_ratio": p99_during / p99_before,
        "rss_growth_pct": 100 * (swaps[-1].rss_kib / swaps[min(1, len(swaps) - 1)].rss_kib - 1),
    }
    rows: list[dict[str, results.Cell]] = [
        {
            "swap": number,
            "until_served_ms": round(swap.served_ms - swap.turned_ms, 1),
            **{f"p{q}_ms": round(float(np.percentile(heard.within(swap.window), q)), 1) for q in (50, 95, 99)},
            "rss_mib": round(swap.rss_kib / 1024, 1),
        }
        for number, swap in enumerate(swaps, 1)
    ]
    before_row = {f"p{q}_ms": round(float(np.percentile(before, q)), 1) for q in (50, 95, 99)}
    rows.insert(0, {"swap": 0, "events": len(before), **before_row})
    path = results.write(NAME, {name: round(value, 3) for name, value in metrics.items()}, rows)
    console.print(metrics, f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--users", type=int, default=60_000)
    args = parser.parse_args()
    asyncio.run(measure(args.swaps, args.users))


if __name__ == "__main__":
    main()
