"""/livez, /readyz and /metrics from a thread of their own, and the watchdog that ends a process that stands still.

They answer while the event loop is blocked: that is when they are needed.
"""

import asyncio
import faulthandler
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from worker import logging, metrics
from worker.config import Health as HealthConfig
from worker.errors import ConfigError, Stalled
from worker.interfaces import Clock, Partition, Source
from worker.stream.offset_tracker import Ledger

log = logging.get("health")
LOOP_LATE_S = 10.0  # a loop that has not turned for so long is blocked: the longest batch on a CPU takes under 1 s
BEAT_S = 0.5


@dataclass(slots=True)
class Pulse:
    """What the probes know. The loop beats; `ready` is set once partitions or a log are being polled."""

    clock: Clock
    beat_s: float = 0.0
    ready: bool = False
    problems: dict[str, str] = field(default_factory=dict)  # by part: why the worker waits

    def alive(self) -> tuple[bool, str]:
        late_s = self.clock.monotonic() - self.beat_s
        return late_s < LOOP_LATE_S, f"event loop turned {late_s:.1f} s ago"

    def serving(self) -> tuple[bool, str]:
        if self.problems:
            return False, "; ".join(f"{part}: {why}" for part, why in sorted(self.problems.items()))
        return self.ready, "serving" if self.ready else "starting"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A probe a second is not news."""


class Health:
    """The HTTP side. `port` is the bound one (config 0 takes a free port)."""

    def __init__(self, config: HealthConfig, pulse: Pulse) -> None:
        self._pages: dict[str, Callable[[], tuple[bool, str]]] = {"/livez": pulse.alive, "/readyz": pulse.serving}
        self._metrics = make_wsgi_app()
        try:
            self._server = make_server(config.host, config.port, self._page, _Server, _Quiet)
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
            return [b"/livez, /readyz and /metrics are here\n"]
        good, text = self._pages[path]()
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [text.encode() + b"\n"]


class Watchdog:
    """Raises Stalled when something is open or lagging and nothing has been settled for `stall_s`."""

    def __init__(self, config: HealthConfig, ledger: Ledger, source: Source, pulse: Pulse, clock: Clock) -> None:
        self._config, self._ledger, self._source, self._pulse, self._clock = config, ledger, source, pulse, clock
        self._settled = -1
        self._moved_s = clock.monotonic()
        self._exported: set[Partition] = set()  # partitions whose lag the metrics show

    async def run(self) -> None:
        try:
            while True:
                self.check()
                await asyncio.sleep(BEAT_S)
        finally:
            self._show({})

    def check(self) -> None:
        now_s = self._clock.monotonic()
        self._pulse.beat_s = now_s
        self._export(now_s)
        waiting = self._ledger.open_count + sum(self._source.lag().values())
        if self._ledger.settled_count != self._settled or not waiting:
            self._settled, self._moved_s = self._ledger.settled_count, now_s
        elif now_s - self._moved_s > self._config.stall_s:
            dump_tasks()
            raise Stalled(
                f"nothing was settled for {now_s - self._moved_s:.0f} s while {waiting} events wait "
                f"({self._ledger.open_count} open); the tasks are dumped above, the process exits to be restarted"
            )

    def _export(self, now_s: float) -> None:
        metrics.OPEN_EVENTS.set(self._ledger.open_count)
        oldest_s = self._ledger.oldest_open_s
        metrics.LAG_SECONDS.set(0.0 if oldest_s is None else now_s - oldest_s)
        self._show(self._source.lag())

    def _show(self, lag: Mapping[Partition, int]) -> None:
        for topic, partition in self._exported - lag.keys():  # another member shows it now
            metrics.LAG.remove(topic, str(partition))
        for (topic, partition), records in lag.items():
            metrics.LAG.labels(topic, str(partition)).set(records)
        self._exported = set(lag)


def dump_tasks() -> None:
    """Every task's and every thread's stack on stderr."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    faulthandler.dump_traceback(file=sys.stderr)
