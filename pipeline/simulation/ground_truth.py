"""Ground truth of a simulated log: the best hit rate and head metrics that any model can reach there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from pipeline.data.log_io import read_event_log, write_log
from pipeline.data.sequences import UserSequences
from pipeline.data.split import split_index
from pipeline.evaluation.metrics import HeadMetrics, head_metrics
from pipeline.features.labels import TASKS, LabelRules, compute_labels
from pipeline.records import Event, EventSchema
from pipeline.simulation.simulator import TRUTHS, Columns, Simulator
from pipeline.simulation.world import SimulatorConfig

SCORED_FROM = 0.8


class GroundTruth(msgspec.Struct, frozen=True):
    """The content of truth.json.

    hit_rate: fraction of all scored events whose item is among the ten likeliest, given the hidden state after the
    user's preceding event and without what serving excludes
    heads: metrics of the true probabilities
    """

    config: SimulatorConfig
    events: int
    scored: int
    hit_rate: float
    heads: dict[str, HeadMetrics]


def simulate(
    config: SimulatorConfig, folder: Path, suffix: str = ".jsonl", on_events: Callable[[int], None] = lambda count: None
) -> GroundTruth:
    """Write events, items.jsonl and truth.json into the folder. on_events is called with the size of each chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    # A little earlier than needed: the split falls into the middle of a day.
    simulator = Simulator(config, SCORED_FROM - 0.05)
    truths: list[Columns] = []

    def events() -> Iterator[Event]:
        for chunk, truth in simulator.chunks():
            truths.append(truth)
            on_events(len(chunk))
            yield from chunk

    log = folder / f"events{suffix}"
    write_log(log, events())
    items = b"".join(msgspec.json.encode(item) + b"\n" for item in simulator.items())
    (folder / "items.jsonl").write_bytes(items)
    truth = _measure(config, log, {name: np.concatenate([part[name] for part in truths]) for name in truths[0]})
    (folder / "truth.json").write_bytes(msgspec.json.format(msgspec.json.encode(truth), indent=2) + b"\n")
    return truth


def _measure(config: SimulatorConfig, path: Path, truth: Columns) -> GroundTruth:
    log = read_event_log(path)
    sequences = UserSequences.from_columns(log.events, np.ones(len(log), np.int32), log.users)
    start = split_index(log.ts_ms, SCORED_FROM)
    labels = compute_labels(sequences.histories, LabelRules.from_options(EventSchema()), int(log.ts_ms[-1]))
    # Labels are stored at an event's predecessor, where the heads predict them.
    positions = sequences.log_positions
    predecessors = np.flatnonzero((positions[1:] >= start) & (sequences.starts[1:] == sequences.starts[:-1]))
    following = positions[predecessors + 1]
    heads = {
        task: head_metrics(truth[column][following], labels[predecessors, number])
        for number, (task, column) in enumerate(zip(TASKS, TRUTHS, strict=True))
    }
    return GroundTruth(config, len(log), len(log) - start, float(truth["hit"][start:].mean()), heads)
