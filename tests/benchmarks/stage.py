"""The stage of the stream's benchmarks: a real broker, a real Valkey, topics, worker processes and their memory."""

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

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from worker.replay.local_servers import LocalKafka, LocalValkey

PARTITIONS = 4
SAMPLE_S = 0.25
WORKER = [sys.executable, "-m", "worker.cli", "run"]
PLAIN = [sys.executable, "-m", "tests.benchmarks.plain_loop"]


@dataclass(frozen=True)
class Stage:
    bootstrap: str
    redis_url: str
    folder: Path

    def environment(self, name: str, settings: dict[str, object]) -> dict[str, str]:
        """A run's own topics and group on the shared broker."""
        values: dict[str, object] = {
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
    def process(self, command: list[str], name: str, settings: dict[str, object]) -> Iterator[subprocess.Popen]:
        """A worker that is stopped at the end; its last words are shown when it ended by itself."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=self.environment(name, settings), stdout=out, stderr=out)
        try:
            yield process
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def stage() -> Iterator[Stage]:
    with TemporaryDirectory(prefix="millrace-bench-") as folder:
        root = Path(folder)
        with LocalKafka(root / "kafka") as kafka, LocalValkey(root / "valkey") as valkey:
            yield Stage(kafka.bootstrap, valkey.url, root)


class Ends:
    """How many records a topic holds."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap)
        self._parts = [TopicPartition(topic, number) for number in range(PARTITIONS)]

    async def __aenter__(self) -> "Ends":
        await self._consumer.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._consumer.stop()

    async def count(self) -> int:
        return sum((await self._consumer.end_offsets(self._parts)).values())


async def slate_counts(stage: Stage, name: str, until: int, process: subprocess.Popen) -> list[tuple[float, int, int]]:
    """(seconds, slates, resident KiB of the process) sampled until the topic holds `until` slates."""
    samples: list[tuple[float, int, int]] = []
    async with Ends(stage.bootstrap, f"{name}.slates") as ends:
        while not samples or samples[-1][1] < until:
            if process.poll() is not None:
                break
            samples.append((time.monotonic(), await ends.count(), resident_kib(process.pid)))
            await asyncio.sleep(SAMPLE_S)
    return samples


def steady_rate(samples: list[tuple[float, int, int]], total: int) -> float:
    """Slates a second between 20 % and 90 % of the run: without the start and the last, smaller batches."""
    inside = [(at, count) for at, count, _ in samples if 0.2 * total <= count <= 0.9 * total]
    if len(inside) < 2:
        raise RuntimeError(f"only {len(inside)} samples of {len(samples)} lie in the steady part; measure longer")
    (start_s, first), (end_s, last) = inside[0], inside[-1]
    return (last - first) / (end_s - start_s)


def resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")), 0)
