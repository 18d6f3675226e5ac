"""What `replay` and `demo` show while events stream, and the summary at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from worker.replay.prequential import PrequentialEvaluator

REFRESH_S = 0.5


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds; NaN while there is nothing."""

    p50_ms: float
    p95_ms: float
    p99_ms: float

    @classmethod
    def from_samples(cls, milliseconds: Sequence[float]) -> "Percentiles":
        if not milliseconds:
            return cls(*[float("nan")] * 3)
        return cls(*(round(float(value), 2) for value in np.percentile(milliseconds, [50, 95, 99])))


@dataclass(slots=True)
class LatencyRecorder:
    """Latencies and rates of a run; `tick` is called by the display, `total` summarises the whole run."""

    started_s: float = field(default_factory=time.monotonic)
    latencies_ms: list[float] = field(default_factory=list)
    recent: Percentiles = field(default_factory=lambda: Percentiles.from_samples([]))
    rate: float = 0.0
    _ticked: tuple[float, int] = (0.0, 0)

    def tick(self, board: PrequentialEvaluator, settled: int) -> None:
        now_s = time.monotonic()
        before_s, before = self._ticked
        self.rate = (settled - before) / max(now_s - (before_s or self.started_s), 1e-3)
        self._ticked = now_s, settled
        taken = board.take_latencies()
        self.latencies_ms += taken
        self.recent = Percentiles.from_samples(taken) if taken else self.recent

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


class ReplayDisplay:
    """A progress bar over the log and a table below it; on a dumb terminal only the summary is printed."""

    def __init__(self, title: str, total: int | None, console: Console) -> None:
        self._title, self._console = title, console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task(title, total=total)
        self._live = Live(console=console, refresh_per_second=1 / REFRESH_S, transient=True)

    def __enter__(self) -> "ReplayDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, recorder: LatencyRecorder, board: PrequentialEvaluator, settled: int, waiting: int) -> None:
        self._progress.update(self._task, completed=settled)
        table = Table(box=None, show_header=False)
        table.add_row("events/s", f"{recorder.rate:,.0f}", "waiting", f"{waiting:,}")
        recent = recorder.recent
        latency = f"p50 {recent.p50_ms:.1f}  p95 {recent.p95_ms:.1f}  p99 {recent.p99_ms:.1f}"
        table.add_row("latency ms", latency, "", "")
        table.add_row("rungs", strategy_shares(board), "scored", f"{board.scored:,}")
        for name in board.rankings:
            table.add_row("hit rate@10", f"{board.hit_rate(name):.3f}", name, "")
        self._live.update(Group(self._progress, table))


def strategy_shares(board: PrequentialEvaluator) -> str:
    total = sum(board.strategies.values())
    return "  ".join(f"{rung} {count / total:.1%}" for rung, count in board.strategies.most_common()) or "none yet"


def print_summary(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, box=None, show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(table)
