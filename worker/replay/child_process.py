"""A local server as a child process that listens on a free port and does not outlive its parent."""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from worker.errors import ConfigError
from worker.executor import SingleThreadExecutor

HOST = "127.0.0.1"
START_S = 60.0  # a broker is up in 4.5 s on two cores; five test sessions on the same two took 20 s
STOP_S = 20.0
# Below the range that the system takes source ports from: a restarted server finds its port free, and a client that
# dials the dead server cannot connect to itself.
PORTS = range(20000, 32000)
# NOTE: PR_SET_PDEATHSIG kills the child when the *thread* that started it ends. This one lives as long as the process.
_STARTER = SingleThreadExecutor("local-servers")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_returned_ports: set[int] = set()  # by free_ports: two servers may be made before either listens


def free_ports(count: int) -> list[int]:
    """Return unused ports, never the same one twice. ConfigError when too few are.

    The search starts at a port that depends on the process.
    """
    start = os.getpid() * 97 % len(PORTS)  # two processes that search at once rarely find the same
    free: list[int] = []
    for step in range(len(PORTS)):
        port = PORTS[(start + step) % len(PORTS)]
        if port in _returned_ports:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((HOST, port)) != 0 and _can_bind(port):
                free.append(port)
        if len(free) == count:
            _returned_ports.update(free)
            return free
    raise ConfigError(
        f"{HOST}: only {len(free)} free ports in {PORTS.start}-{PORTS.stop - 1}, want {count}; stop other servers"
    )


class LocalServer:
    """One child process that listens on a port. Subclasses define its command.

    error: constructor of the error raised when it cannot be started
    """

    def __init__(self, data_dir: str | Path, port: int, error: Callable[[str], Exception]) -> None:
        self.data_dir = Path(data_dir)
        self.port = port or free_ports(1)[0]
        self.log_path = self.data_dir / "server.log"
        self._error = error
        self._process: subprocess.Popen | None = None
        atexit.register(self.kill)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The running process's id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the server on its data directory; return when it accepts connections."""
        if _is_listening(self.port):
            raise self._error(f"{type(self).__name__}: another process listens on {self.address}; choose another port")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._prepare()
        self._process = _STARTER.submit(_spawn, self._command(), self.log_path).result()
        deadline_s = time.monotonic() + START_S
        while not _is_listening(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                raise self._error(f"{type(self).__name__} did not start on {self.address}: {self._last_log_line()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL if the process lives longer than STOP_S."""
        self._terminate(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL: an end without shutdown, like a machine failure."""
        self._terminate(signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _prepare(self) -> None:
        """Write the files that the process needs."""

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _terminate(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _last_log_line(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return f"{lines[-1] if lines else 'it logged nothing'} (log: {self.log_path})"


def _spawn(command: Sequence[str], log_path: Path) -> subprocess.Popen:
    """Start the command in a session of its own: Ctrl-C ends the worker first, which then stops the servers."""
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if _LIBC else None,
        )


def _die_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def _can_bind(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, port))
        except OSError:
            return False
    return True
