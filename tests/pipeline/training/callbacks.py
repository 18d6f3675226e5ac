"""A training callback that does nothing, shared by the training tests."""

from pipeline.training.train import EpochReport


class SilentCallback:
    """Implements TrainingCallback."""

    def note(self, text: str) -> None: ...

    def phase(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...
