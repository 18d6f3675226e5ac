"""Training in the terminal: a bar over all batches, with the loss and the hit rate as they go."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.training.train import EpochReport

SMOOTHING = 0.95  # of the shown loss, over some twenty batches


class TrainingDisplay:
    """A pipeline.training.Observer. Without a terminal it prints a line an epoch."""

    def __init__(self, console: Console) -> None:
        self._console, self._stage, self._epochs = console, "", 0
        self._loss: float | None = None
        self._hits = ""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._bar = self._progress.add_task("training", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def phase(self, name: str, epochs: int) -> None:
        self._stage, self._epochs, self._loss = name, epochs, None
        self._progress.reset(self._bar, total=epochs)
        if name != "epoch" and not self._console.is_terminal:
            self._console.print(f"{name} 1 to {epochs}")

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        text = f"{self._stage} {epoch}/{self._epochs}  loss {self._loss:.3f}{self._hits}"
        self._progress.update(self._bar, completed=epoch - 1 + done / total, description=text)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        now, high = report.validation, best.validation.ndcg
        self._hits = f"  hit@10 {now.hit_rate:.4f} NDCG {now.ndcg:.4f} (best {high:.4f}, epoch {best.epoch})"
        if not self._console.is_terminal:
            self._console.print(f"epoch {report.epoch}/{self._epochs}  loss {report.loss:.3f}{self._hits}")
