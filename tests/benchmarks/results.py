"""Result files: written by the benchmark that measured them, one per benchmark, in tests/benchmarks/results.

The commit is git's; where the tree travels without its repository, MILLRACE_COMMIT names it.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

FOLDER = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]

Cell = str | int | float | bool | None


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a benchmark that ran by itself, at its own commit and on its own machine. created: ISO 8601, UTC."""

    stage: str
    commit: str
    command: str
    hardware: str
    created: str


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One run. `metrics` are the figures that the documents quote; `rows` has one record per measurement.

    stages: of a benchmark that ran in stages, in their order; the last one wrote the file
    """

    name: str
    commit: str
    command: str
    hardware: str
    created: str
    metrics: dict[str, float]
    rows: list[dict[str, Cell]]
    stages: list[Stage] = []


def this_stage(name: str) -> Stage:
    """Describe this process as a stage that begins now; its commit is marked when the working tree differs from it."""
    return Stage(name, commit(), _command(), hardware(), datetime.now(UTC).isoformat(timespec="seconds"))


def distinct_stages(stages: Iterable[Stage]) -> list[Stage]:
    """Return one stage per name, commit, command and machine, the earliest, in order of time."""
    first: dict[tuple[str, ...], Stage] = {}
    for each in sorted(stages, key=lambda each: each.created):
        first.setdefault((each.stage, each.commit, each.command, each.hardware), each)
    return list(first.values())


def write(
    name: str,
    metrics: dict[str, float],
    rows: list[dict[str, Cell]],
    folder: Path = FOLDER,
    measured_on: str | None = None,
    stages: Iterable[Stage] = (),
) -> Path:
    """Write the result of this process.

    measured_on: the hardware, if the figures come from another machine than this one
    stages: those before this process, of a benchmark that runs in stages; this one is added as `report`
    """
    here = this_stage("report")
    before = distinct_stages(stages)
    machine = measured_on or here.hardware
    all_stages = [*before, here] if before else []
    result = Result(name, here.commit, here.command, machine, here.created, metrics, rows, all_stages)
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


def commit() -> str:
    """Return the commit of the measured tree, 12 digits, followed by "+changes" when the tree differs from it."""
    if named := os.environ.get("MILLRACE_COMMIT"):
        return named

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # Results that an earlier benchmark of the same run wrote are not a change of the measured code.
    changed = git("status", "--porcelain", "-uno", "--", ".", f":(exclude){FOLDER.relative_to(ROOT)}")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def _command() -> str:
    return " ".join(["python", "-m", _module(), *map(shlex.quote, sys.argv[1:])])


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
