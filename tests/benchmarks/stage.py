"""Servers and processes of the stream's benchmarks: a real broker, a real Valkey, topics, workers and their memory."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from worker.replay.local_servers import LocalKafka, LocalValkey

PARTITIONS = 4
SAMPLE_S = 0.25
WORKER = [sys.executable, "-m", "worker.cli", "run"]
PLAIN = [sys.executable, "-m", "tests.benchmarks.plain_loop"]

Settings = dict[str, object]  # SECTION__KEY: value


class Sample(NamedTuple):
    """State of a run at one moment."""

    at_s: float
    slates: int
    rss_kib: int


@dataclass(frozen=True)
class Stage:
    """A running broker and Valkey, and a folder for the runs' files."""

    bootstrap: str
    redis_url: str
    folder: Path

    def environment(self, name: str, settings: Settings) -> dict[str, str]:
        """Return the environment of a run with topics and a group of its own on the shared broker."""
        values: Settings = {
            "KAFKA__BOOTSTRAP_SERVERS": self.bootstrap,
            "KAFKA__EVENTS_TOPIC": f"{name}.events",
            "KAFKA__RECOMMENDATIONS_TOPIC": f"{name}.slates",
            "KAFKA__DEAD_LETTER_TOPIC": f"{name}.dead",
            "KAFKA__GROUP_ID": name,
            "REDIS__URL": self.redis_url,
            "SEQUENCES__TOPIC_GENERATION": name,
            "HEALTH__PORT": 0,
            "LOG__LEVEL": "warning",
        }
        return os.environ | {f"MILLRACE__{key}": str(value) for key, value in (values | settings).items()}

    async def create_topics(self, name: str) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        await admin.start()
        await admin.create_topics([NewTopic(f"{name}.{kind}", PARTITIONS, 1) for kind in ("events", "slates", "dead")])
        await admin.close()

    @contextmanager
    def process(self, command: list[str], name: str, settings: Settings) -> Iterator[subprocess.Popen]:
        """Run a worker until the end of the block. RuntimeError with the end of its log when it has exited before."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=self.environment(name, settings), stdout=out, stderr=out)
        try:
            yield process
            if process.poll() is not None:
                raise RuntimeError(f"{name} exited with {process.returncode}:\n{log.read_text()[-3000:]}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def stage() -> Iterator[Stage]:
    with TemporaryDirectory(prefix="millrace-bench-") as folder:
        root = Path(folder)
        with LocalKafka(root / "kafka") as kafka, LocalValkey(root / "valkey") as valkey:
            yield Stage(kafka.bootstrap, valkey.url, root)


class TopicSize:
    """Counts the records of a topic."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
        self._partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]

    async def __aenter__(self) -> "TopicSize":
        await self._consumer.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._consumer.stop()

    async def count(self) -> int:
        return sum((await self._consumer.end_offsets(self._partitions)).values())


async def sample_slates(stage: Stage, name: str, until: int, process: subprocess.Popen) -> list[Sample]:
    """Sample the process until its topic holds `until` slates, or until it exits."""
    samples: list[Sample] = []
    async with TopicSize(stage.bootstrap, f"{name}.slates") as size:
        while not samples or samples[-1].slates < until:
            if process.poll() is not None:
                break
            samples.append(Sample(time.monotonic(), await size.count(), resident_kib(process.pid)))
            await asyncio.sleep(SAMPLE_S)
    return samples


def steady_rate(samples: list[Sample], total: int) -> float:
    """Return slates per second between 20 % and 90 % of the run: without the start and the last, smaller batches."""
    inside = [sample for sample in samples if 0.2 * total <= sample.slates <= 0.9 * total]
    if len(inside) < 2:
        raise RuntimeError(f"only {len(inside)} of {len(samples)} samples are in the steady part; measure longer")
    first = inside[0]
    last = inside[-1]
    return (last.slates - first.slates) / (last.at_s - first.at_s)


def resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")), 0)
