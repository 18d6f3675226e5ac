"""`millrace run` as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

COMMAND = [sys.executable, "-m", "worker.cli", "run"]


def launch(log: Path, **settings: object) -> subprocess.Popen:
    """Start a worker with settings (SECTION__KEY=value); its output goes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen(COMMAND, env=environment(settings), stdout=out, stderr=out)


def run_to_end(**settings: object) -> subprocess.CompletedProcess:
    """Run a worker until it exits by itself."""
    return subprocess.run(COMMAND, env=environment(settings), capture_output=True, text=True, timeout=120)


def environment(settings: dict[str, object]) -> dict[str, str]:
    """Return this process's environment with the settings, and a free port for health checks."""
    return os.environ | {f"MILLRACE__{key}": str(value) for key, value in {"HEALTH__PORT": 0, **settings}.items()}
