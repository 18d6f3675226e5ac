"""The live display of `millrace replay` and `millrace demo`, and the summary at the end."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worker.output.printable import printable
from worker.output.tables import PrintableTable
from worker.replay.prequential import CUTOFF, PrequentialEvaluator

REFRESH_S = 0.5


class Percentiles(msgspec.Struct, frozen=True):
    """Latency percentiles in milliseconds; NaN without samples."""

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
    """Collects latencies and the event rate of a run, at every `tick`."""

    started_s: float = field(default_factory=time.monotonic)
    latencies_ms: list[float] = field(default_factory=list)
    recent: Percentiles = field(default_factory=lambda: Percentiles.from_samples([]))
    events_per_s: float = 0.0  # since the previous tick
    _ticked_s: float = 0.0
    _ticked_events: int = 0

    def tick(self, evaluator: PrequentialEvaluator, completed: int) -> None:
        """Take the evaluator's new latencies. completed: number of events completed since the start"""
        now_s = time.monotonic()
        elapsed_s = now_s - (self._ticked_s or self.started_s)
        self.events_per_s = (completed - self._ticked_events) / max(elapsed_s, 1e-3)
        self._ticked_s = now_s
        self._ticked_events = completed
        if latencies_ms := evaluator.take_latencies():
            self.latencies_ms += latencies_ms
            self.recent = Percentiles.from_samples(latencies_ms)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


class ReplayDisplay:
    """A progress bar over the log with a table below it. Shows nothing unless the console is a terminal."""

    def __init__(self, title: str, total: int | None, console: Console) -> None:
        self._console = console
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

    def show(self, recorder: LatencyRecorder, evaluator: PrequentialEvaluator, completed: int, pending: int) -> None:
        self._progress.update(self._task, completed=completed)
        recent = recorder.recent
        latency = f"p50 {recent.p50_ms:.1f}  p95 {recent.p95_ms:.1f}  p99 {recent.p99_ms:.1f}"
        table = PrintableTable(box=None, show_header=False)
        table.add_row("events/s", f"{recorder.events_per_s:,.0f}", "pending", f"{pending:,}")
        table.add_row("latency ms", latency, "", "")
        strategies = format_fractions(evaluator.strategies) or "none yet"
        backends = format_fractions(evaluator.backends) or "none yet"
        table.add_row("strategies", strategies, "scored", f"{evaluator.scored:,}")
        table.add_row("backends", backends, "", "")
        for ranking in evaluator.rankings:
            table.add_row(f"hit rate@{CUTOFF}", f"{evaluator.hit_rate(ranking):.3f}", ranking, "")
        self._live.update(Group(self._progress, table))


def format_fractions(slates: Mapping[str, int]) -> str:
    """Return each name's fraction of the slates, largest first; empty without slates."""
    total = sum(slates.values())
    by_count = sorted(slates.items(), key=lambda item: -item[1])
    return "  ".join(f"{name} {count / total:.1%}" for name, count in by_count)


def print_summary(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = PrintableTable(title=printable(title), box=None, show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(table)
