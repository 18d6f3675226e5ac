"""One worker process of a fleet: started, heard, ended."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from worker.fleet.heartbeat import VARIABLE
from worker.interfaces import Clock

COMMAND = (sys.executable, "-m", "worker.cli", "run")
START_S = 300.0  # until the first heartbeat: imports and, on a slow disk, more imports
CHECK_S = 0.2
PAUSE_S = 5.0  # a check that is late by so much: this process was suspended, and has heard nothing meanwhile


class Member:
    """A running process.

    heard_s: Clock.monotonic() of its latest heartbeat, or of its start; port: of its health server, 0 = not known yet
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process, heartbeats: int, clock: Clock) -> None:
        """heartbeats: the descriptor to read them from"""
        self.number = number
        self.process = process
        self.port = 0
        self.started_s = self.heard_s = clock.monotonic()
        self._clock = clock
        self._listening = asyncio.create_task(self._listen(heartbeats), name=f"worker {number} heartbeat")

    @classmethod
    async def start(
        cls, number: int, arguments: Sequence[str], environment: Mapping[str, str], clock: Clock
    ) -> "Member":
        """Start `millrace run ARGUMENTS...` with more environment variables than this process has."""
        read_fd, write_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *arguments,
                env=os.environ | dict(environment) | {VARIABLE: str(write_fd)},
                pass_fds=(write_fd,),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the fleet alone, which drains its members
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        return cls(number, process, read_fd, clock)

    async def _listen(self, fd: int) -> None:
        """Read heartbeats until the process ends."""
        reader = asyncio.StreamReader()
        with os.fdopen(fd, "rb") as pipe:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                while line := await reader.readline():
                    self.port = int(line)
                    self.heard_s = self._clock.monotonic()
            finally:
                transport.close()

    async def ended(self, silent_s: float) -> int:
        """Return the exit status, once the process has ended by itself or was killed after so much silence."""
        waiting = asyncio.ensure_future(self.process.wait())
        try:
            while not waiting.done():
                before_s = self._clock.monotonic()
                await asyncio.wait({waiting}, timeout=CHECK_S)
                now_s = self._clock.monotonic()
                if now_s - before_s > PAUSE_S:
                    self.heard_s = now_s
                if now_s - self.heard_s > (silent_s if self.port else max(silent_s, START_S)):
                    self.signal(signal.SIGKILL)
            return waiting.result()
        finally:
            waiting.cancel()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still runs."""
        if self.process.returncode is None:
            self.process.send_signal(number)
