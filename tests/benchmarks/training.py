"""Training on a large log: memory and time by phase, from the file on disk to the saved artifact.

The log is generated: 250,000 users of log-normal activity and 100,000 items by Zipf's law. It has no pattern to learn,
so the losses mean nothing. `millrace train`'s own code reads, splits, counts, labels and samples it in full. But an
epoch ends after --events-per-epoch events, with batches drawn from all events: a full epoch would only repeat more of
the same, at the same speed and in the same memory. `peak_rss_gib` is that of the process, with torch and the generator.

On a GPU the result is training_gpu.json.

usage: python -m tests.benchmarks.training [--events 10000000] [--events-per-epoch 200000] [--events-per-batch 2048]
           [--device cuda] [--out DIR]
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console

from pipeline.data.log_io import read_event_log
from pipeline.records import DAY_MS, EventSchema
from pipeline.strategies.options import PipelineOptions
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions
from tests.benchmarks import results
from tests.benchmarks.results import Cell

USERS = 250_000
ITEMS = 100_000
DAYS = 90
ACTIONS = np.frombuffer(b"viewlikecartskip", np.uint8).reshape(4, 4)  # four letters each: all lines are equally long
ACTION_STEPS = (0.7, 0.85, 0.9)  # cumulative probabilities of the first three
START_MS = 1_700_000_000_000
BLOCK_EVENTS = 1 << 18
RESET_PEAK_RSS = "5"  # written to /proc/self/clear_refs, see proc(5)


def write_log(path: Path, events: int, seed: int = 0) -> None:
    """Write delimited text in time order, a million events in 1.5 s."""
    rng = np.random.default_rng(seed)
    item_weights = np.cumsum(1 / np.arange(1, ITEMS + 1))
    user_weights = np.cumsum(rng.lognormal(0, 1, USERS))
    with path.open("wb") as file:
        file.write(b"user\titem\taction\tts_ms\n")
        for start in range(0, events, BLOCK_EVENTS):
            n = min(BLOCK_EVENTS, events - start)
            columns = (
                _digits(np.searchsorted(user_weights, rng.random(n) * user_weights[-1]), 6),
                _digits(np.searchsorted(item_weights, rng.random(n) * item_weights[-1]), 6),
                ACTIONS[np.searchsorted(ACTION_STEPS, rng.random(n))],
                _digits(START_MS + np.arange(start, start + n) * (DAYS * DAY_MS // events), 13),
            )
            cells = [cell for column in columns for cell in (column, np.full((n, 1), ord("\t"), np.uint8))]
            cells[-1] = np.full((n, 1), ord("\n"), np.uint8)
            file.write(np.hstack(cells).tobytes())


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return uint8 [n, width]: decimal digits with leading zeros."""
    return (numbers[:, None] // 10 ** np.arange(width - 1, -1, -1) % 10 + ord("0")).astype(np.uint8)


class PhaseTimer:
    """A training callback that records each phase's seconds and peak memory."""

    def __init__(self, device: str, events_per_batch: int) -> None:
        self.rows: list[dict[str, Cell]] = []
        self._device = device
        self._events_per_batch = events_per_batch
        self._since_s = time.perf_counter()
        self._refitting = False

    def end(self, phase: str, trained: int | None = None) -> None:
        """Record the phase that ends now. trained: the events it trained on."""
        seconds = time.perf_counter() - self._since_s
        row: dict[str, Cell] = {
            "phase": phase,
            "device": self._device,
            "seconds": seconds,
            "peak_rss_gib": _peak_gib(),
            "trained_events": trained,
            "events_per_s": trained / seconds if trained else None,
        }
        self.rows.append(row)
        Console().print(row)
        Path("/proc/self/clear_refs").write_text(RESET_PEAK_RSS)
        self._since_s = time.perf_counter()

    def note(self, text: str) -> None: ...

    def phase(self, name: str, epochs: int) -> None:
        self._refitting = name != "epoch"
        self.end("calibrate, columns of all events" if self._refitting else "split, count, columns")

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        prefix = "refit: " if self._refitting else ""
        if done == 1:
            self.end(f"{prefix}first step")
        if done == total:
            self.end(f"{prefix}steps", (done - 1) * self._events_per_batch)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.end("validate and checkpoint")


def _peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / (1 << 20)


def measure(folder: Path, events: int, trainer: TrainerOptions, device: str) -> list[dict[str, Cell]]:
    options = TrainingOptions(trainer, train_fraction=1.0)
    timer = PhaseTimer(device, options.trainer.events_per_batch)
    write_log(folder / "log.tsv", events)
    timer.end("generate")
    log = read_event_log(folder / "log.tsv", schema=EventSchema())
    assert len(log) == events
    timer.end("read")
    train(log, folder / "artifact", options, PipelineOptions(device=device), timer, "")
    timer.end("save")
    return timer.rows


def compute_metrics(rows: list[dict[str, Cell]], events: int) -> dict[str, float]:
    """Return the figures that the documents quote. The speed is over all steps except each training's first one,
    which also sets things up."""
    steps = [row for row in rows if row["trained_events"]]
    trained, seconds = (sum(float(row[name] or 0) for row in steps) for name in ("trained_events", "seconds"))
    name = "events_per_s_gpu" if _is_gpu(str(rows[0]["device"])) else "events_per_s_cpu"
    peak = max(float(row["peak_rss_gib"] or 0) for row in rows)
    return {"peak_rss_gib": peak, name: trained / seconds, "events": float(events), "trained_events": trained}


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def main() -> None:
    defaults = TrainerOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000, help="events of the log (default 10000000)")
    epoch_help = "events per epoch, of which there are two: one is validated, one refits (default 200000)"
    parser.add_argument("--events-per-epoch", type=int, default=200_000, help=epoch_help)
    batch_help = f"events per optimizer step (default {defaults.events_per_batch})"
    parser.add_argument("--events-per-batch", type=int, default=defaults.events_per_batch, help=batch_help)
    parser.add_argument("--device", default="cpu", help="device to train on (default cpu)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of training.json")
    args = parser.parse_args()
    trainer = TrainerOptions(epochs=1, events_per_epoch=args.events_per_epoch, events_per_batch=args.events_per_batch)
    with TemporaryDirectory(prefix="millrace-training-") as folder:
        rows = measure(Path(folder), args.events, trainer, args.device)
    metrics = compute_metrics(rows, args.events)
    name = "training_gpu" if _is_gpu(args.device) else "training"
    Console().print(metrics, f"written: {results.write(name, metrics, rows, args.out)}")


if __name__ == "__main__":
    main()
