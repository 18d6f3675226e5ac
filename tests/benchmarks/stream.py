"""The stream's speed, latency and memory on this machine, everything real and on the same cores: broker, Valkey, load.

Throughput: a topic is filled first, then the plain loop or the worker runs on it; the ratio is taken in this one run.
Latency: at half and at a quarter of the worker's rate, from the event's creation (just before its append) to the slate
in a consumer's hands; the load and that consumer take their share of the same cores.
Memory: resident size of the worker over the long run, after the first fifth of it.

usage: python -m tests.benchmarks.stream [--events 1000000] [--users 100000]
"""

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer
from rich.console import Console

from pipeline.records import Covers, Event, EventPacker
from tests.benchmarks import results
from tests.benchmarks.load import Shoppers
from tests.benchmarks.stage import PLAIN, WORKER, Stage, slate_counts, stage, steady_rate
from worker import config
from worker.clock import WallClock
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.process import build_components
from worker.replay.feed import Wait, at_once, at_rate, produce

HISTORY_EVENTS = 5  # of every user, before the first run
PLAIN_EVENTS, SIMPLE_EVENTS = 2_000, 120_000
WAKING_EVENTS, WARM_S, LATENCY_S = 2_000, 10.0, 30.0
console = Console()


def make_artifact(folder: Path) -> Path:
    """A model of the default shape (2 layers, width 64); its accuracy does not matter here, its cost does."""
    for command in (
        ["simulate", "--events", "60000", "--users", "2000", "--items", "2000", "--out", str(folder / "shop")],
        ["train", str(folder / "shop" / "events.jsonl"), "--out", str(folder / "artifact"), "--epochs", "1"],
    ):
        subprocess.run([sys.executable, "-m", "worker.cli", *command], check=True, capture_output=True)
    return folder / "artifact"


async def fill_rings(stage: Stage, shoppers: Shoppers, settings: dict[str, object]) -> None:
    """HISTORY_EVENTS of every user, pushed as the worker pushes."""
    loaded = config.load(None, stage.environment("history", settings))
    pack, source, offset = EventPacker(loaded.schema).pack, Partition("history", 0), 0
    async with build_components(loaded, WallClock()) as made:
        users = iter(shoppers.user_ids())
        while chunk := list(islice(users, 400)):
            arrivals = []
            for user in chunk:
                for back in range(HISTORY_EVENTS, 0, -1):
                    event = shoppers.event(user, time.time_ns() // 1_000_000 - back * 60_000)
                    arrivals.append(ConsumedEvent(event, pack(event), RecordOffset(source, 1, offset), 1 << 60, 0, 0.0))
                    offset += 1
            await made.sequences.push(arrivals)


async def throughput(
    stage: Stage, name: str, command: list[str], settings: dict[str, object], events: Iterator[Event], count: int
) -> tuple[float, list[tuple[float, int, int]]]:
    """Slates a second, and the samples, over `count` events that lie in the topic already."""
    await stage.create_topics(name)
    await fill_topic(stage, name, events, count)
    with stage.process(command, name, settings) as process:
        samples = await slate_counts(stage, name, count * 98 // 100, process)
    rate = steady_rate(samples, count)
    console.print(f"{name:<14} {rate:9,.0f} slates/s")
    return rate, samples


async def fill_topic(stage: Stage, name: str, events: Iterator[Event], count: int, wait: Wait = at_once) -> None:
    kafka = config.load(None, stage.environment(name, {})).kafka
    await produce(kafka, islice(events, count), wait)


class Answered(msgspec.Struct):
    """The part of a slate that is looked at."""

    covers: Covers
    model_version: str


async def answers(consumer: AIOKafkaConsumer, events: float) -> AsyncIterator[tuple[float, list[Answered]]]:
    """(milliseconds since 1970, the slates read then), until so many events are covered."""
    decode, covered = msgspec.json.Decoder(Answered).decode, 0
    while covered < events:
        for records in (await consumer.getmany(timeout_ms=100)).values():
            now_ms = time.time_ns() / 1e6
            read = [decode(record.value) for record in records]
            covered += sum(slate.covers.count for slate in read)
            yield now_ms, read


async def latency(
    stage: Stage, name: str, settings: dict[str, object], shoppers: Shoppers, rate: float
) -> dict[str, float]:
    """Of every slate of LATENCY_S at this rate, once the worker is up and has run at it for WARM_S."""
    events, taken = shoppers.events(), []
    await stage.create_topics(name)
    consumer = AIOKafkaConsumer(f"{name}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
    async with consumer:
        with stage.process(WORKER, name, settings):
            await fill_topic(stage, name, events, WAKING_EVENTS)
            async for _ in answers(consumer, WAKING_EVENTS):
                pass
            count, warm_s = int(rate * (WARM_S + LATENCY_S)), time.monotonic() + WARM_S
            load = asyncio.create_task(fill_topic(stage, name, events, count, at_rate(rate)))
            async for now_ms, read in answers(consumer, count):
                if time.monotonic() > warm_s:
                    taken += [now_ms - slate.covers.oldest_ts_ms for slate in read]
            await load
    p50, p95, p99 = (float(value) for value in np.percentile(taken, [50, 95, 99]))
    console.print(f"{name:<14} {rate:9,.0f} slates/s: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "latency_rate_per_s": rate}


def growth_pct(samples: list[tuple[float, int, int]], total: int) -> float:
    """Resident size at the end over that after the first fifth, medians of a twentieth of the run each."""
    after = np.median([kib for _, count, kib in samples if 0.2 * total <= count <= 0.25 * total])
    end = np.median([kib for _, count, kib in samples if count >= 0.93 * total])
    return float(100 * (end / after - 1))


async def events_per_slate(stage: Stage, names: list[str]) -> float:
    """From `covers.count` of every slate of these runs."""
    decode, covered, slates = msgspec.json.Decoder(Answered).decode, 0, 0
    for name in names:
        consumer = AIOKafkaConsumer(f"{name}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
        async with consumer:
            while records := [record for part in (await consumer.getmany(timeout_ms=2000)).values() for record in part]:
                slates += len(records)
                covered += sum(decode(record.value).covers.count for record in records)
    return covered / slates


async def measure(events: int, users: int) -> None:
    with stage() as set_up:
        artifact = make_artifact(set_up.folder)
        items = msgspec.msgpack.decode((artifact / "vocabulary.msgpack").read_bytes(), type=list[str])
        shoppers = Shoppers(users, items)
        hstu: dict[str, object] = {"PIPELINE__ARTIFACT": artifact, "PIPELINE__THREADS": 1}
        simple = hstu | {"PIPELINE__STRATEGY": "simple"}
        await fill_rings(set_up, shoppers, simple)
        stream = shoppers.events()
        plain_simple, _ = await throughput(set_up, "plain-simple", PLAIN, simple, stream, PLAIN_EVENTS)
        plain_hstu, _ = await throughput(set_up, "plain-hstu", PLAIN, hstu, stream, PLAIN_EVENTS)
        worker_simple, _ = await throughput(set_up, "worker-simple", WORKER, simple, stream, SIMPLE_EVENTS)
        worker_hstu, samples = await throughput(set_up, "worker-hstu", WORKER, hstu, stream, events)
        quarter = await latency(set_up, "quarter", hstu, shoppers, worker_hstu / 4)
        half = await latency(set_up, "half", hstu, shoppers, worker_hstu / 2)
        per_slate = await events_per_slate(set_up, ["worker-simple", "worker-hstu", "quarter", "half"])
    metrics = {
        "simple_speedup": worker_simple / plain_simple,
        "hstu_speedup": worker_hstu / plain_hstu,
        "slates_per_s_simple": worker_simple,
        "slates_per_s_hstu": worker_hstu,
        "events_per_slate": per_slate,
        **half,
        "rss_growth_pct": growth_pct(samples, events),
    }
    rates = {"plain simple": plain_simple, "plain hstu": plain_hstu, "simple": worker_simple, "hstu": worker_hstu}
    rows: list[dict[str, results.Cell]] = [{"run": run, "slates_per_s": round(rate, 1)} for run, rate in rates.items()]
    rows.append({"run": "a quarter of the rate", **{name: round(value, 1) for name, value in quarter.items()}})
    start_s, step = samples[0][0], max(1, len(samples) // 100)
    rows += [
        {"run": "memory", "seconds": round(at - start_s, 1), "slates": count, "rss_mib": round(kib / 1024, 1)}
        for at, count, kib in samples[::step]
    ]
    path = results.write("stream", {name: round(value, 3) for name, value in metrics.items()}, rows)
    console.print(metrics, f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="of the long run (default 1000000)")
    parser.add_argument("--users", type=int, default=100_000)
    args = parser.parse_args()
    asyncio.run(measure(args.events, args.users))


if __name__ == "__main__":
    main()
