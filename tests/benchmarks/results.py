"""Result files: written by the benchmark that measured them, one per benchmark, in tests/benchmarks/results."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]

Cell = str | int | float | bool | None


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run. `metrics` are the figures that the documents quote; `rows` has one record per measurement."""

    name: str
    commit: str
    command: str
    hardware: str
    created: str
    metrics: dict[str, float]
    rows: list[dict[str, Cell]]


def write(
    name: str,
    metrics: dict[str, float],
    rows: list[dict[str, Cell]],
    folder: Path = FOLDER,
    measured_on: str | None = None,
) -> Path:
    """Write the result of this process; its commit is marked when the working tree differs from it.

    measured_on: the hardware, if the figures come from another machine than this one.
    """
    command = " ".join(["python", "-m", _module(), *map(shlex.quote, sys.argv[1:])])
    created = datetime.now(UTC).isoformat(timespec="seconds")
    result = Result(name, _commit(), command, measured_on or hardware(), created, metrics, rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    load(path)
    return path


def load(path: str | Path) -> Result:
    """Read a result. Raises msgspec.ValidationError unless it is one with finite figures and the file's name."""
    result = msgspec.json.decode(Path(path).read_bytes(), type=Result)
    if result.name != Path(path).stem:
        raise msgspec.ValidationError(f"{path} holds the result '{result.name}'")
    return result


def hardware() -> str:
    """Return cores, processor, memory and GPU of this machine."""
    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "?")
    kib = next((int(line.split()[1]) for line in _read("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return f"{os.cpu_count()} cores {cpu}, {kib >> 20} GiB, {_gpu()}, Python {platform.python_version()}"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # Results that an earlier benchmark of the same run wrote are not a change of the measured code.
    changed = git("status", "--porcelain", "-uno", "--", ".", f":(exclude){FOLDER.relative_to(ROOT)}")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
