"""Learning curves of a training: a JSON file and, where matplotlib is there, a picture of it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Self

import msgspec

from pipeline.training.train import EpochReport, TrainingCallback
from worker.commands.output_paths import check_file
from worker.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


class Point(msgspec.Struct, frozen=True):
    """One judged epoch; `loss` in nats, the others at 10 of the validation slice."""

    epoch: int
    loss: float
    hit_rate: float
    ndcg: float


class LearningCurves:
    """A pipeline.training.Observer that remembers the epochs for another one, and writes them however training ends.

    Into FILE.json; a picture's name gets the picture, too.
    """

    def __init__(self, file: Path, inner: TrainingCallback) -> None:
        """ConfigError when the file cannot be written, or is a picture and matplotlib is not there."""
        if file.suffix not in (*PICTURES, ".json"):
            raise ConfigError(f"--learning-curves: {file}: want a name that ends in {', '.join(PICTURES)} or .json")
        if file.suffix in PICTURES and find_spec("matplotlib") is None:
            raise ConfigError(
                f"--learning-curves: {file} needs matplotlib: pip install 'millrace[plots]', or name a .json file"
            )
        check_file(file, "--learning-curves")
        self._file, self._inner = file, inner
        self.points: list[Point] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.points:
            return
        text = msgspec.json.format(msgspec.json.encode(self.points), indent=1)
        self._file.with_suffix(".json").write_bytes(text + b"\n")
        if self._file.suffix in PICTURES:
            draw(self.points, self._file)

    def phase(self, name: str, epochs: int) -> None:
        self._inner.phase(name, epochs)

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        self._inner.batch(epoch, loss, done, total)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.points.append(Point(report.epoch, report.loss, report.validation.hit_rate, report.validation.ndcg))
        self._inner.epoch(report, best)


def draw(points: list[Point], file: Path) -> None:
    """The loss over the epochs, and beside it what the validation slice said; the best epoch is marked."""
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
