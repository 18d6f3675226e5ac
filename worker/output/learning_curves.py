"""Learning curves of a training run: a JSON file and, with matplotlib, a plot of it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Self

import msgspec

from pipeline.training.train import EpochReport, TrainingCallback
from worker.errors import ConfigError
from worker.output.paths import check_file

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class EpochPoint(msgspec.Struct, frozen=True):
    """One validated epoch. loss: in nats; hit_rate, ndcg: at 10, on the validation slice"""

    epoch: int
    loss: float
    hit_rate: float
    ndcg: float


class LearningCurves:
    """A TrainingCallback that records the epochs, passes every call to `inner`, and writes the file when training ends.

    Writes it after an error, too: FILE with the suffix .json, and the plot if FILE has a plot's suffix.
    """

    def __init__(self, file: Path, inner: TrainingCallback) -> None:
        """Check the file. ConfigError when it cannot be written, or is a plot and matplotlib is not installed."""
        if file.suffix not in (*PLOT_SUFFIXES, ".json"):
            suffixes = ", ".join(PLOT_SUFFIXES)
            raise ConfigError(f"--learning-curves: {file}: want a name that ends in {suffixes} or .json")
        if file.suffix in PLOT_SUFFIXES and find_spec("matplotlib") is None:
            raise ConfigError(
                f"--learning-curves: {file} needs matplotlib: pip install 'millrace[plots]', or name a .json file"
            )
        check_file(file, "--learning-curves")
        self._file = file
        self._inner = inner
        self.points: list[EpochPoint] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.points:
            return
        text = msgspec.json.format(msgspec.json.encode(self.points), indent=1)
        self._file.with_suffix(".json").write_bytes(text + b"\n")
        if self._file.suffix in PLOT_SUFFIXES:
            plot(self.points, self._file)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def phase(self, name: str, epochs: int) -> None:
        self._inner.phase(name, epochs)

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        self._inner.batch(epoch, loss, done, total)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.points.append(EpochPoint(report.epoch, report.loss, report.validation.hit_rate, report.validation.ndcg))
        self._inner.epoch(report, best)


def plot(points: list[EpochPoint], file: Path) -> None:
    """Plot the loss per epoch, and next to it the validation metrics with the best epoch marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [point.epoch for point in points]
    left.plot(epochs, [point.loss for point in points], color="tab:gray")
    left.set(title="loss of the next item", xlabel="epoch", ylabel="nats")
    right.plot(epochs, [point.hit_rate for point in points], label="hit rate@10")
    right.plot(epochs, [point.ndcg for point in points], label="NDCG@10")
    best = max(points, key=lambda point: (point.ndcg, point.epoch))
    right.axvline(best.epoch, color="tab:gray", linestyle=":", label=f"best: epoch {best.epoch}")
    right.set(title="validation slice", xlabel="epoch", ylim=(0, None))
    right.legend()
    figure.savefig(file, dpi=150)
