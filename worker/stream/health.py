"""/livez, /readyz and /metrics from a thread of their own, and the watchdog that ends a stalled process.

They answer while the event loop is blocked: that is when they are needed.
"""

import asyncio
import contextlib
import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app

from worker import logging, metrics
from worker.config import HealthConfig
from worker.errors import ConfigError, Stalled
from worker.interfaces import Clock, Partition, Source
from worker.stream.offset_tracker import OffsetTracker

log = logging.get("health")
LOOP_BLOCKED_S = 10.0  # without a heartbeat the loop is blocked: the longest batch on a CPU takes under 1 s
HEARTBEAT_S = 0.01  # short, since its lateness is measured
CHECK_S = 0.5  # between two checks of the watchdog
MAX_CONNECTIONS = 32  # probes and scrapes, a few per second and milliseconds each; one more is closed at once
CONNECTION_S = 5.0  # a probe waits 1 s, Prometheus 10 s for a page that takes milliseconds


class Probes(Protocol):
    """The answers to the probes: whether all is well, and a sentence."""

    def alive(self) -> tuple[bool, str]: ...

    def serving(self) -> tuple[bool, str]: ...


@dataclass(slots=True)
class HealthState:
    """The state that the probes report. `ready` is set once the source has started."""

    clock: Clock
    heartbeat_s: float = 0.0  # Clock.monotonic() of the event loop's last heartbeat
    ready: bool = False
    problems: dict[str, str] = field(default_factory=dict)  # by part: why the worker waits
    next_attempt_s: float = 0.0  # Clock.monotonic() of the next attempt of a write that failed: no stall until then

    async def beat(self) -> None:
        """Set the heartbeat until cancelled. A task of its own: a start beats, too, however long it takes."""
        self.heartbeat_s = self.clock.monotonic()
        while True:
            due_s = self.clock.monotonic() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self.heartbeat_s = self.clock.monotonic()
            metrics.LOOP_STALL_SECONDS.observe(max(0.0, self.heartbeat_s - due_s))

    def alive(self) -> tuple[bool, str]:
        late_s = self.clock.monotonic() - self.heartbeat_s
        return late_s < LOOP_BLOCKED_S, f"last event loop heartbeat {late_s:.1f} s ago"

    def serving(self) -> tuple[bool, str]:
        if self.problems:
            return False, "; ".join(f"{part}: {why}" for part, why in sorted(self.problems.items()))
        return self.ready, "serving" if self.ready else "starting"


class _Server(ThreadingMixIn, WSGIServer):
    """A thread per connection, for at most MAX_CONNECTIONS of them, each for at most CONNECTION_S."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._opened_s: dict[Any, float] = {}  # by socket
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._opened_s) >= MAX_CONNECTIONS:
            self.shutdown_request(request)
            return
        self._opened_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._opened_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that are open for too long, by any way of being slow. Called twice per second."""
        oldest_s = time.monotonic() - CONNECTION_S
        for request in [request for request, opened_s in list(self._opened_s.items()) if opened_s < oldest_s]:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("probe failed", client=client_address, exc_info=True)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: one probe per second is noise."""


class HealthServer:
    """Serves the probes over HTTP. `port` is the bound one (config 0 takes a free port)."""

    def __init__(self, config: HealthConfig, state: Probes, registry: CollectorRegistry = REGISTRY) -> None:
        self._pages: dict[str, Callable[[], tuple[bool, str]]] = {"/livez": state.alive, "/readyz": state.serving}
        self._metrics = make_wsgi_app(registry)
        try:
            self._server = make_server(config.host, config.port, self._page, _Server, _SilentHandler)
        except OSError as error:
            where = f"{config.host}:{config.port}"
            raise ConfigError(f"health: cannot listen on {where}: {error.strerror}; set health.port, or 0") from error
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _page(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path not in self._pages:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"try /livez, /readyz or /metrics\n"]
        good, text = self._pages[path]()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [text.encode() + b"\n"]


class Watchdog:
    """Raises Stalled when events are open or lagging and none was completed for `stall_timeout_s`.

    A server that is away is no stall: every failed attempt of a write, which /readyz names, counts as progress.
    """

    def __init__(
        self, config: HealthConfig, tracker: OffsetTracker, source: Source, health: HealthState, clock: Clock
    ) -> None:
        self._config = config
        self._tracker = tracker
        self._source = source
        self._health = health
        self._clock = clock
        self._completed = -1
        self._progress_s = clock.monotonic()
        self._exported: set[Partition] = set()  # partitions whose lag the metrics show
        self._standing: list[str] = []  # partitions that were reported as standing still

    async def run(self) -> None:
        try:
            while True:
                self.check()
                await asyncio.sleep(CHECK_S)
        finally:
            self._export_partitions({}, {})

    def check(self) -> None:
        """Export the gauges, and report partitions that stand still. Raises Stalled."""
        now_s = self._clock.monotonic()
        lag = self._source.lag()
        stalled_s = self._source.stalled_s()
        self._export(now_s)
        self._export_partitions(lag, stalled_s)
        self._check_partitions(stalled_s)
        waiting = self._tracker.open_count + sum(lag.values())
        if self._tracker.completed_count != self._completed or not waiting:
            self._completed = self._tracker.completed_count
            self._progress_s = now_s
        elif now_s - max(self._progress_s, self._health.next_attempt_s) > self._config.stall_timeout_s:
            dump_tasks()
            raise Stalled(
                f"no event was completed for {now_s - self._progress_s:.0f} s while {waiting} wait "
                f"({self._tracker.open_count} open); the tasks are dumped above, the process exits to be restarted"
            )

    def _check_partitions(self, stalled_s: Mapping[Partition, float]) -> None:
        """Report partitions that stand still. Raises Stalled for one that does so for too long."""
        self._report("source", self._source.problem())
        limit_s = self._config.partition_stall_s
        standing = sorted(f"{topic}-{number}" for (topic, number), late_s in stalled_s.items() if late_s > limit_s)
        reason = f"records wait in {', '.join(standing)}, which stand still for more than {limit_s:g} s"
        self._report("partitions", reason if standing else "")
        if standing != self._standing:
            log.warning("partitions that stand still while records wait have changed", partitions=standing)
            self._standing = standing
        if standing and max(stalled_s.values()) > self._config.stall_timeout_s:
            dump_tasks()
            raise Stalled(f"{reason}; the tasks are dumped above, the process exits to be restarted")

    def _report(self, part: str, problem: str) -> None:
        if problem:
            self._health.problems[part] = problem
        else:
            self._health.problems.pop(part, None)

    def _export(self, now_s: float) -> None:
        metrics.IN_FLIGHT_EVENTS.set(self._tracker.open_count)
        oldest_s = self._tracker.oldest_open_s
        metrics.OLDEST_IN_FLIGHT_SECONDS.set(0.0 if oldest_s is None else now_s - oldest_s)

    def _export_partitions(self, lag: Mapping[Partition, int], stalled_s: Mapping[Partition, float]) -> None:
        for topic, partition in self._exported - lag.keys():  # another member exports it now
            metrics.LAG.remove(topic, str(partition))
            metrics.STALLED_SECONDS.remove(topic, str(partition))
        for (topic, partition), records in lag.items():
            metrics.LAG.labels(topic, str(partition)).set(records)
            metrics.STALLED_SECONDS.labels(topic, str(partition)).set(stalled_s.get(Partition(topic, partition), 0.0))
        self._exported = set(lag)


def dump_tasks() -> None:
    """Print every task's and every thread's stack to stderr."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
