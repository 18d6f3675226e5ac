"""What could be known of a simulated log: the measure of a model is not 1.0, it is the truth."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from pipeline.data.log_io import read_event_log, write_log
from pipeline.data.sequences import UserSequences, split_index
from pipeline.evaluation.metrics import HeadMetrics, head_metrics
from pipeline.features.labels import TASKS, compute_labels
from pipeline.records import EventSchema
from pipeline.simulation.simulator import Columns, Simulator
from pipeline.simulation.world import SimulatorConfig

SCORED_FROM = 0.8
TRUE_PROBABILITIES = dict(zip(TASKS, ("engaged", "returned", "monetized"), strict=True))


class GroundTruth(msgspec.Struct, frozen=True):
    """truth.json. hit_rate: share of the scored events whose item was among the ten likeliest given the hidden state
    after the user's preceding event, what serving excludes left out; all scored events in the denominator.
    heads: of the true probabilities."""

    config: SimulatorConfig
    events: int
    scored: int
    hit_rate: float
    heads: dict[str, HeadMetrics]


def simulate(
    config: SimulatorConfig, folder: Path, suffix: str = ".jsonl", on_events: Callable[[int], None] = lambda count: None
) -> GroundTruth:
    """Write events, items.jsonl and truth.json into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # A little earlier than needed: the cut falls on a day's middle.
    simulator, truths = Simulator(config, SCORED_FROM - 0.05), []

    def events():
        for chunk, truth in simulator.chunks():
            truths.append(truth)
            on_events(len(chunk))
            yield from chunk

    log = folder / f"events{suffix}"
    write_log(log, events())
    items = b"".join(msgspec.json.encode(item) + b"\n" for item in simulator.items())
    (folder / "items.jsonl").write_bytes(items)
    truth = _measured(config, log, {name: np.concatenate([part[name] for part in truths]) for name in truths[0]})
    (folder / "truth.json").write_bytes(msgspec.json.format(msgspec.json.encode(truth), indent=2) + b"\n")
    return truth


def _measured(config: SimulatorConfig, path: Path, truth: Columns) -> GroundTruth:
    schema, log = EventSchema(), read_event_log(path)
    corpus = UserSequences.from_columns(log.events, np.ones(len(log), np.int32), log.users)
    start, histories = split_index(log.ts_ms, SCORED_FROM), corpus.histories
    labels = compute_labels(histories, schema, int(log.ts_ms[-1]))
    # Labels stand at an event's predecessor, as the heads predict them.
    before = np.flatnonzero((corpus.log_positions[1:] >= start) & (corpus.starts[1:] == corpus.starts[:-1]))
    following = corpus.log_positions[before + 1]
    heads = {
        task: head_metrics(truth[TRUE_PROBABILITIES[task]][following], labels[before, number])
        for number, task in enumerate(TASKS)
    }
    return GroundTruth(config, len(log), len(log) - start, float(truth["hit"][start:].mean()), heads)
