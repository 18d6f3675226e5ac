"""Hit rates of the slates: a real log through Kafka, and a simulated log against its ground truth.

Real log (MILLRACE_DATA, default ../shared/data: MovieLens 100k): MOVIELENS_MODEL is trained on its first 80 %. Then the
full log goes through a real broker and the worker, one slate per event, and the oracle checks every ring and slate.
Simulated log: SHOP_MODEL is trained in the same way, and `millrace evaluate` gives the hit rates of a replay.

Rows name each model by the options of `millrace train` that differ from the defaults.

Models, the replay's report and the evaluation are files in the folder --work as soon as they are there: the same
command continues where an earlier one was stopped, a training after its last full epoch.

usage: python -m tests.benchmarks.replay [--epochs N] [--simulated-events 200000] [--work DIR] [--out DIR]
"""

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from msgspec.structs import replace as replaced
from redis.asyncio import Redis
from rich.console import Console

from tests.benchmarks import results
from tests.benchmarks.workers import save
from tests.oracle import Oracle
from worker import config_file
from worker.replay.local_servers import LocalKafka, LocalValkey
from worker.replay.replay import ReplayOptions, replay
from worker.replay.report import ReplayReport

MAX_EVENTS = 1024  # per ring, longer than any sequence of the log
# The shop's transitions are sparse and sharp, so the model needs width. Hit rate@10 on the full validation slice of the
# training log (8,000 events), best epoch: width 256 0.478 (three seeds 0.476-0.479), 384 0.479, 512 0.482, 768 0.479.
SHOP_MODEL: list[object] = ["--width", 512, "--heads", 8, "--dropout", 0.3, "--attention-dropout", 0.7]
SHOP_MODEL += ["--temperature", 0.07, "--epochs", 16]
# The best of a few on the validation slice of the film log's training part, when ties were still sorted by item.
MOVIELENS_MODEL: list[object] = ["--temperature", 0.12, "--dropout", 0.4]
LOG = Path(os.environ.get("MILLRACE_DATA", "../shared/data")) / "ml-100k" / "ml-100k.inter"


class RealReplay(msgspec.Struct, frozen=True):
    """The replay of the real log. rings: number of rings, all of which equal the oracle's."""

    report: ReplayReport
    rings: int


def millrace(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "worker.cli", *map(str, arguments)], check=True)


def train(log: Path, artifact: Path, options: list[object]) -> None:
    """Train an artifact unless it is there, from its checkpoint if there is one."""
    checkpoint = artifact.with_name(f"{artifact.name}.checkpoint.safetensors")
    if not artifact.exists():
        millrace("train", log, "--out", artifact, *options, *(["--resume"] if checkpoint.exists() else []))


def real_replay(folder: Path, training: list[object]) -> RealReplay:
    """Train on the real log and replay it through Kafka, unless that was done before."""
    path = folder / "replayed.json"
    train(LOG, folder / "artifact", [*MOVIELENS_MODEL, *training])
    if not path.exists():
        save(path, asyncio.run(replay_through_kafka(folder / "artifact", folder, Console())))
    return msgspec.json.decode(path.read_bytes(), type=RealReplay)


async def replay_through_kafka(artifact: Path, folder: Path, console: Console) -> RealReplay:
    settings = config_file.load(None, {"MILLRACE__SEQUENCES__MAX_EVENTS": str(MAX_EVENTS)})
    settings = replaced(settings, pipeline=replaced(settings.pipeline, artifact=str(artifact)))
    with (
        TemporaryDirectory(prefix="millrace-servers-") as servers,
        LocalKafka(Path(servers) / "kafka") as kafka,
        LocalValkey(Path(servers) / "valkey") as valkey,
    ):
        options = ReplayOptions(LOG, folder / "slates.jsonl", kafka=kafka.bootstrap, redis=valkey.url)
        report = await replay(settings, options, console)
        return RealReplay(report, await check(kafka.bootstrap, options.name, valkey.url))


async def check(bootstrap: str, name: str, redis_url: str) -> int:
    """Return the number of rings. AssertionError unless all equal the oracle's and every event is answered."""
    oracle = Oracle(f"{name}.events", MAX_EVENTS)
    async for record in every_record(bootstrap, f"{name}.events"):
        oracle.feed(record.partition, record.offset, msgspec.json.decode(record.value))
    async with Redis.from_url(redis_url) as redis:
        keys = [key async for key in redis.scan_iter(f"{name}:seq:*", count=1000)]
        stored = dict(zip([key.decode() for key in keys], await redis.mget(keys), strict=True))
    assert stored == oracle.rings(f"{name}:"), "rings differ from the oracle's"
    topic = f"{name}.recommendations"
    oracle.check_slates([msgspec.json.decode(record.value) async for record in every_record(bootstrap, topic)])
    return len(stored)


async def every_record(bootstrap: str, topic: str) -> AsyncIterator[ConsumerRecord]:
    """Yield all records of a topic, each partition's in offset order."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    async with consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record


def simulated(events: int, folder: Path, training: list[object]) -> dict[str, float]:
    """Return hit rates on a simulated log, and the fraction of the gap from co-occurrence to truth that hstu closes."""
    log = folder / "shop" / "events.jsonl"
    size = ["--events", events, "--users", events // 40, "--items", events // 100]
    if not (folder / "shop" / "truth.json").exists():
        millrace("simulate", "--out", folder / "shop", *size)
    train(log, folder / "shop-artifact", training)
    if not (folder / "shop.json").exists():
        millrace("evaluate", folder / "shop-artifact", log, "--report", folder / "shop.json")
    report = msgspec.json.decode((folder / "shop.json").read_bytes())
    rates = {name: row["at"]["10"]["hit_rate"]["value"] for name, row in report["rankings"].items()}
    truth = msgspec.json.decode((folder / "shop" / "truth.json").read_bytes())["hit_rate"]
    closed = (rates["hstu"] - rates["cooccurrence"]) / (truth - rates["cooccurrence"])
    return {**{f"hit_rate_{name}": rate for name, rate in rates.items()}, "hit_rate_truth": truth, "closed": closed}


def as_text(options: list[object]) -> str:
    return " ".join(map(str, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    epochs_help = "number of epochs of both trainings (default: millrace train's and SHOP_MODEL's)"
    parser.add_argument("--epochs", type=int, help=epochs_help)
    parser.add_argument("--simulated-events", type=int, default=200_000, help="length of the simulated log")
    parser.add_argument("--work", type=Path, help="folder of models and reports (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of replay.json")
    args = parser.parse_args()
    training: list[object] = ["--epochs", args.epochs] if args.epochs else []
    with TemporaryDirectory(prefix="millrace-replay-") as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        replayed = real_replay(folder, training)
        shop = simulated(args.simulated_events, folder, [*SHOP_MODEL, *training])
    real = replayed.report
    assert real.strategies == {"hstu": real.slates}, f"other strategies answered too: {real.strategies}"
    metrics = {
        "hit_rate_hstu": real.hit_rates["slate"],
        "hit_rate_cooccurrence": real.hit_rates["cooccurrence"],
        "hit_rate_popularity": real.hit_rates["popularity"],
        "scored_fraction": real.scored_fraction,
        "tied_fraction": real.tied_fraction,
        "truth_gap_closed_simulated": round(shop["closed"], 4),
        "events": real.events,
        "slates": real.slates,
        "lost": real.lost,
    }
    rates = {f"hit_rate_{name}": rate for name, rate in real.hit_rates.items()}
    rates |= {f"hit_rate_{name}_untied": rate for name, rate in real.untied_hit_rates.items()}
    rows: list[dict[str, results.Cell]] = [
        {
            "log": "ml-100k",
            "model": as_text(MOVIELENS_MODEL),
            "rings_equal": replayed.rings,
            **rates,
            "events_per_s": real.events_per_s,
        },
        {"log": "simulated", "model": as_text(SHOP_MODEL), **shop},
    ]
    Console().print(metrics, f"written: {results.write('replay', metrics, rows, args.out)}")


if __name__ == "__main__":
    main()
