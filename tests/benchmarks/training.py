"""Training on a large log: memory and time by phase, from the file on disk to the signed artifact.

The log is a generated one: 250,000 users of log-normal activity, 100,000 items by Zipf's law, no pattern to learn; so
its losses mean nothing. It is read, cut, counted, labelled and sampled whole, by `millrace train`'s own code. But an
epoch takes its batches, drawn from all events, only up to --trained events: the rest of an epoch would repeat them, at
the same speed and in the same memory. `peak_rss_gib` is the whole process', torch and the generator included.

On a GPU the result is training_gpu.json.

usage: python -m tests.benchmarks.training [--events 10000000] [--trained 200000] [--batch-events 2048] [--device cuda]
           [--out DIR]
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from pipeline.data.log_io import read_event_log
from pipeline.records import EventSchema
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions
from tests.benchmarks import results
from tests.benchmarks.results import Cell

USERS, ITEMS, DAYS = 250_000, 100_000, 90
ACTIONS = np.frombuffer(b"viewlikecartskip", np.uint8).reshape(4, 4)  # of four letters: lines are of one length
ACTION_STEPS = (0.7, 0.85, 0.9)
START_MS, DAY_MS = 1_700_000_000_000, 86_400_000
BLOCK_EVENTS = 1 << 18
CLEAR_PEAK = "5"  # proc(5): what /proc/self/clear_refs resets the peak by


def write_log(path: Path, events: int, seed: int = 0) -> None:
    """Delimited text in time order: 1.5 s a million events."""
    random = np.random.default_rng(seed)
    of_items = np.cumsum(1 / np.arange(1, ITEMS + 1))
    of_users = np.cumsum(random.lognormal(0, 1, USERS))
    with path.open("wb") as file:
        file.write(b"user\titem\taction\tts_ms\n")
        for start in range(0, events, BLOCK_EVENTS):
            n = min(BLOCK_EVENTS, events - start)
            columns = (
                _digits(np.searchsorted(of_users, random.random(n) * of_users[-1]), 6),
                _digits(np.searchsorted(of_items, random.random(n) * of_items[-1]), 6),
                ACTIONS[np.searchsorted(ACTION_STEPS, random.random(n))],
                _digits(START_MS + np.arange(start, start + n) * (DAYS * DAY_MS // events), 13),
            )
            cells = [cell for column in columns for cell in (column, np.full((n, 1), ord("\t"), np.uint8))]
            cells[-1] = np.full((n, 1), ord("\n"), np.uint8)
            file.write(np.hstack(cells).tobytes())


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, width]: decimal, with leading zeros."""
    return (numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")).astype(np.uint8)


class Phases:
    """An observer that notes each phase's seconds and peak memory."""

    def __init__(self, device: str, batch_events: int) -> None:
        self.rows: list[dict[str, Cell]] = []
        self._device, self._batch_events = device, batch_events
        self._since = time.perf_counter()
        self._anew = False

    def ended(self, phase: str, trained: int | None = None) -> None:
        seconds = time.perf_counter() - self._since
        row: dict[str, Cell] = {"phase": phase, "device": self._device, "seconds": seconds, "peak_rss_gib": _peak_gib()}
        self.rows.append(row | {"trained_events": trained, "events_per_s": trained / seconds if trained else None})
        Console().print(self.rows[-1])
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
        self._since = time.perf_counter()

    def phase(self, name: str, epochs: int) -> None:
        self._anew = name != "epoch"
        self.ended("calibrate, examples of all" if self._anew else "cut, count, examples")

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        if done == 1:
            self.ended("anew: first step" if self._anew else "first step")
        if done == total:
            self.ended("anew: steps" if self._anew else "steps", (done - 1) * self._batch_events)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.ended("judge and checkpoint")


def _peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / (1 << 20)


def measure(folder: Path, events: int, trainer: TrainerOptions, device: str) -> list[dict[str, Cell]]:
    options = TrainingOptions(trainer, train_fraction=1.0)
    phases = Phases(device, options.trainer.events_per_batch)
    write_log(folder / "log.tsv", events)
    phases.ended("generate")
    log = read_event_log(folder / "log.tsv", schema=EventSchema())
    assert len(log) == events
    phases.ended("read")
    train(log, folder / "artifact", options, PipelineOptions(device=device), phases, "")
    phases.ended("save")
    return phases.rows


def metrics_of(rows: list[dict[str, Cell]], events: int) -> dict[str, float]:
    """What the docs quote. The speed is that of all steps but each training's first, which also sets things up."""
    steps = [row for row in rows if row["trained_events"]]
    trained, seconds = (sum(float(row[name] or 0) for row in steps) for name in ("trained_events", "seconds"))
    name = "events_per_s_gpu" if _on_gpu(str(rows[0]["device"])) else "events_per_s_cpu"
    peak = max(float(row["peak_rss_gib"] or 0) for row in rows)
    return {"peak_rss_gib": peak, name: trained / seconds, "events": float(events), "trained_events": trained}


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--trained", type=int, default=200_000, help="events of an epoch; one is judged, one is anew")
    parser.add_argument("--batch-events", type=int, default=TrainerOptions().events_per_batch)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of training.json")
    args = parser.parse_args()
    trainer = TrainerOptions(epochs=1, events_per_epoch=args.trained, events_per_batch=args.batch_events)
    with TemporaryDirectory(prefix="millrace-training-") as folder:
        rows = measure(Path(folder), args.events, trainer, args.device)
    metrics, name = metrics_of(rows, args.events), "training_gpu" if _on_gpu(args.device) else "training"
    Console().print(metrics, f"written: {results.write(name, metrics, rows, args.out)}")


if __name__ == "__main__":
    main()
