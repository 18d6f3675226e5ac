"""Throughput, latency and memory of the stream on this machine, with broker, Valkey and load on the same cores.

Throughput: a topic is filled first, then the plain loop or the worker runs on it. Their ratio is of this one run.
Latency: at half and at a quarter of the worker's rate, from an event's creation (just before its append) to its slate
in a consumer's hands. The load and that consumer use the same cores.
Memory: resident size of the worker over the long run, after its first fifth.

usage: python -m tests.benchmarks.stream [--events 1000000] [--users 100000] [--out DIR]
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

from pipeline.records import Event, EventPacker
from pipeline.slates import Covers
from tests.benchmarks import results
from tests.benchmarks.load import Shoppers
from tests.benchmarks.stage import PLAIN, WORKER, Sample, Settings, Stage, sample_slates, stage, steady_rate
from worker import config_file
from worker.clock import WallClock
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.process import build_components
from worker.replay.feed import Wait, at_once, at_rate, produce

HISTORY_EVENTS = 5  # per user, before the first run
FILL_USERS = 400  # pushed together
PLAIN_EVENTS = 2_000
SIMPLE_EVENTS = 120_000
WARM_UP_EVENTS = 2_000
WARM_UP_S = 10.0
LATENCY_S = 30.0
console = Console()


def train_model(folder: Path) -> Path:
    """Train a model of the default shape (2 layers, width 64). Only its cost matters here, not its accuracy."""
    for command in (
        ["simulate", "--events", "60000", "--users", "2000", "--items", "2000", "--out", str(folder / "shop")],
        ["train", str(folder / "shop" / "events.jsonl"), "--out", str(folder / "artifact"), "--epochs", "1"],
    ):
        subprocess.run([sys.executable, "-m", "worker.cli", *command], check=True, capture_output=True)
    return folder / "artifact"


def read_item_ids(artifact: Path) -> list[str]:
    return msgspec.msgpack.decode((artifact / "vocabulary.msgpack").read_bytes(), type=list[str])


async def fill_rings(stage: Stage, shoppers: Shoppers, settings: Settings) -> None:
    """Push HISTORY_EVENTS events of every user, as the worker does."""
    loaded = config_file.load(None, stage.environment("history", settings))
    pack = EventPacker(loaded.schema).pack
    partition = Partition("history", 0)
    offset = 0
    async with build_components(loaded, WallClock()) as components:
        users = iter(shoppers.user_ids())
        while chunk := list(islice(users, FILL_USERS)):
            consumed = []
            for user in chunk:
                for minutes_ago in range(HISTORY_EVENTS, 0, -1):
                    event = shoppers.event(user, time.time_ns() // 1_000_000 - minutes_ago * 60_000)
                    record_offset = RecordOffset(partition, 1, offset)
                    consumed.append(ConsumedEvent(event, pack(event), record_offset, 1 << 60, 0, 0.0))
                    offset += 1
            await components.sequences.push(consumed)


async def throughput(
    stage: Stage, name: str, command: list[str], settings: Settings, events: Iterator[Event], count: int
) -> tuple[float, list[Sample]]:
    """Return slates per second, and the samples, over `count` events that are in the topic before the start."""
    await stage.create_topics(name)
    await fill_topic(stage, name, events, count)
    with stage.process(command, name, settings) as process:
        samples = await sample_slates(stage, name, count * 98 // 100, process)
    rate = steady_rate(samples, count)
    console.print(f"{name:<14} {rate:9,.0f} slates/s")
    return rate, samples


async def fill_topic(stage: Stage, name: str, events: Iterator[Event], count: int, wait: Wait = at_once) -> None:
    kafka = config_file.load(None, stage.environment(name, {})).kafka
    await produce(kafka, islice(events, count), wait)


class SlateSummary(msgspec.Struct):
    """The fields of a slate that the benchmarks read."""

    covers: Covers
    model_version: str


async def read_slates(consumer: AIOKafkaConsumer, events: float) -> AsyncIterator[tuple[float, list[SlateSummary]]]:
    """Yield (milliseconds since 1970, the slates read then) until `events` events are covered."""
    decode = msgspec.json.Decoder(SlateSummary).decode
    covered = 0
    while covered < events:
        for records in (await consumer.getmany(timeout_ms=100)).values():
            now_ms = time.time_ns() / 1e6
            slates = [decode(record.value) for record in records]
            covered += sum(slate.covers.count for slate in slates)
            yield now_ms, slates


async def latency(stage: Stage, name: str, settings: Settings, shoppers: Shoppers, rate: float) -> dict[str, float]:
    """Return percentiles over all slates of LATENCY_S at this rate, after WARM_UP_S at it."""
    events = shoppers.events()
    latencies_ms: list[float] = []
    await stage.create_topics(name)
    consumer = AIOKafkaConsumer(f"{name}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
    async with consumer:
        with stage.process(WORKER, name, settings):
            await fill_topic(stage, name, events, WARM_UP_EVENTS)
            async for _ in read_slates(consumer, WARM_UP_EVENTS):
                pass
            count = int(rate * (WARM_UP_S + LATENCY_S))
            warm_s = time.monotonic() + WARM_UP_S
            load = asyncio.create_task(fill_topic(stage, name, events, count, at_rate(rate)))
            async for now_ms, slates in read_slates(consumer, count):
                if time.monotonic() > warm_s:
                    latencies_ms += [now_ms - slate.covers.oldest_ts_ms for slate in slates]
            await load
    p50, p95, p99 = (float(value) for value in np.percentile(latencies_ms, [50, 95, 99]))
    console.print(f"{name:<14} {rate:9,.0f} slates/s: p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    return {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "latency_rate_per_s": rate}


def growth_pct(samples: list[Sample], total: int) -> float:
    """Return how far the resident size at the end exceeds that after the first fifth (medians of short spans)."""
    after = np.median([sample.rss_kib for sample in samples if 0.2 * total <= sample.slates <= 0.25 * total])
    end = np.median([sample.rss_kib for sample in samples if sample.slates >= 0.93 * total])
    return float(100 * (end / after - 1))


async def events_per_slate(stage: Stage, names: list[str]) -> float:
    """Return the mean of `covers.count` over all slates of these runs."""
    decode = msgspec.json.Decoder(SlateSummary).decode
    covered = 0
    slates = 0
    for name in names:
        consumer = AIOKafkaConsumer(f"{name}.slates", bootstrap_servers=stage.bootstrap, auto_offset_reset="earliest")
        async with consumer:
            while records := [record for part in (await consumer.getmany(timeout_ms=2000)).values() for record in part]:
                slates += len(records)
                covered += sum(decode(record.value).covers.count for record in records)
    return covered / slates


async def measure(events: int, users: int, out: Path) -> None:
    with stage() as servers:
        artifact = train_model(servers.folder)
        shoppers = Shoppers(users, read_item_ids(artifact))
        hstu: Settings = {"PIPELINE__ARTIFACT": artifact, "PIPELINE__THREADS": 1}
        simple = hstu | {"PIPELINE__STRATEGY": "simple"}
        await fill_rings(servers, shoppers, simple)
        stream = shoppers.events()
        plain_simple, _ = await throughput(servers, "plain-simple", PLAIN, simple, stream, PLAIN_EVENTS)
        plain_hstu, _ = await throughput(servers, "plain-hstu", PLAIN, hstu, stream, PLAIN_EVENTS)
        worker_simple, _ = await throughput(servers, "worker-simple", WORKER, simple, stream, SIMPLE_EVENTS)
        worker_hstu, samples = await throughput(servers, "worker-hstu", WORKER, hstu, stream, events)
        quarter = await latency(servers, "quarter", hstu, shoppers, worker_hstu / 4)
        half = await latency(servers, "half", hstu, shoppers, worker_hstu / 2)
        per_slate = await events_per_slate(servers, ["worker-simple", "worker-hstu", "quarter", "half"])
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
    rows += memory_rows(samples)
    path = results.write("stream", {name: round(value, 3) for name, value in metrics.items()}, rows, out)
    console.print(metrics, f"written: {path}")


def memory_rows(samples: list[Sample]) -> list[dict[str, results.Cell]]:
    """Return about a hundred of the samples as rows."""
    return [
        {
            "run": "memory",
            "seconds": round(sample.at_s - samples[0].at_s, 1),
            "slates": sample.slates,
            "rss_mib": round(sample.rss_kib / 1024, 1),
        }
        for sample in samples[:: max(1, len(samples) // 100)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000, help="length of the long run (default 1000000)")
    users_help = "number of users; far more than events in flight, or slates coalesce (default 100000)"
    parser.add_argument("--users", type=int, default=100_000, help=users_help)
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of stream.json")
    args = parser.parse_args()
    asyncio.run(measure(args.events, args.users, args.out))


if __name__ == "__main__":
    main()
