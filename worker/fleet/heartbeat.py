"""The line from a worker process to its fleet: its health port, once per second for as long as its event loop runs.

A file descriptor that the child inherits, named in its environment.
"""

import asyncio
import os
from collections.abc import Callable, Mapping

VARIABLE = "MILLRACE_FLEET_FD"
BEAT_S = 1.0


def inherited_fd(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the descriptor to write to; None for a process without a fleet."""
    return int(environment[VARIABLE]) if VARIABLE in environment else None


async def beat(fd: int, port: int, on_orphaned: Callable[[], None]) -> None:
    """Write the port until cancelled. When the fleet is gone, call `on_orphaned` and return."""
    line = b"%d\n" % port
    while True:
        try:
            os.write(fd, line)  # a pipe holds 64 KiB: it never blocks while the fleet reads
        except OSError:
            on_orphaned()
            return
        await asyncio.sleep(BEAT_S)
