"""Progress of training in the terminal: a bar over all batches with loss, hit rate and NDCG."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.training.train import EpochReport

SMOOTHING = 0.95  # of the displayed loss: an average over some twenty batches


class TrainingDisplay:
    """A TrainingCallback. Without a terminal it prints one line per epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._epochs = 0
        self._loss: float | None = None
        self._metrics = ""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._bar = self._progress.add_task("training", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def phase(self, name: str, epochs: int) -> None:
        self._phase = name
        self._epochs = epochs
        self._loss = None
        self._progress.reset(self._bar, total=epochs)
        if name != "epoch" and not self._console.is_terminal:
            self._console.print(f"{name} 1 to {epochs}")

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        text = f"{self._phase} {epoch}/{self._epochs}  loss {self._loss:.3f}{self._metrics}"
        self._progress.update(self._bar, completed=epoch - 1 + done / total, description=text)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        latest = report.validation
        best_ndcg = f"best {best.validation.ndcg:.4f}, epoch {best.epoch}"
        self._metrics = f"  hit@10 {latest.hit_rate:.4f} NDCG {latest.ndcg:.4f} ({best_ndcg})"
        if not self._console.is_terminal:
            self._console.print(f"epoch {report.epoch}/{self._epochs}  loss {report.loss:.3f}{self._metrics}")
