"""`millrace` commands as processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MILLRACE = [sys.executable, "-m", "worker.cli"]


def launch(log: Path, *arguments: str, **settings: object) -> subprocess.Popen:
    """Start `millrace run ARGUMENTS...` with settings (SECTION__KEY=value); its output goes to `log`."""
    with log.open("wb") as out:
        return subprocess.Popen([*MILLRACE, "run", *arguments], env=environment(settings), stdout=out, stderr=out)


def run_to_end(**settings: object) -> subprocess.CompletedProcess:
    """Run a worker until it exits by itself."""
    return run_command(["run"], settings)


def run_command(words: Sequence[str], settings: Mapping[str, object]) -> subprocess.CompletedProcess:
    """Run `millrace WORDS...` to its end."""
    command = [*MILLRACE, *words]
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=120)


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return this process's environment with the settings, and a free port for health checks."""
    return os.environ | {f"MILLRACE__{key}": str(value) for key, value in {"HEALTH__PORT": 0, **settings}.items()}


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Return the complete lines that were logged so far."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
