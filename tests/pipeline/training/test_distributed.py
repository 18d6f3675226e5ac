"""Several processes train what one trains. They are started here, by their variables, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.items.vocabulary import Vocabulary
from pipeline.model import heads
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training import losses
from pipeline.training.batches import TrainingBatch, TrainingColumns, make_batch
from pipeline.training.distributed import SINGLE_PROCESS, process_group
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions

ROOT = Path(__file__).parents[3]
# Without dropout, which each process draws for its own part. AdamW divides by what is near 0 in its first steps, so the
# last bits of a sum show: the fewer steps the less.
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=2, crop_length=8, events_per_batch=64, weighting="uncertainty"),
    HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=8, dropout=0.0, attention_dropout=0.0),
)
VARIANTS = {
    "events": OPTIONS,
    "sessions": replace(OPTIONS, model=replace(OPTIONS.model, recent_events=4, history_events=16)),
    "sampled softmax": OPTIONS,
}


class Silent:
    """An observer."""

    def phase(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


def log_of(users: int = 12) -> EventLog:
    random = np.random.default_rng(0)
    actions = ("view", "click", "cart")
    events = [
        Event(f"u{user}", f"i{random.integers(30)}", actions[random.integers(3)], 60_000 * step + user)
        for user in range(users)
        for step in range(5 + user)
    ]
    return event_log_from_blocks([events], EventSchema())


def train_one(out: str, variant: str) -> None:
    """What each of the processes runs."""
    heads.DROPOUT = 0.0
    if variant == "sampled softmax":
        losses.FULL_SOFTMAX_ITEMS, losses.UNIFORM_NEGATIVES = 0, 8
    with process_group(torch.device("cpu")) as processes:
        options, pipeline = VARIANTS[variant], PipelineOptions(device="cpu", threads=1)
        train(log_of(), Path(out), options, pipeline, Silent(), "", False, (), None, processes)


def run_processes(out: Path, count: int, variant: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    code = f"import runpy; runpy.run_path({__file__!r})['train_one']({str(out)!r}, {variant!r})"
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **rendezvous, **paths, "RANK": str(rank)})
        for rank in range(count)
    ]
    assert [process.wait(timeout=300) for process in started] == [0] * count


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_the_weights_of_one_and_the_first_alone_writes(tmp_path: Path, variant: str) -> None:
    run_processes(tmp_path / "one", 1, variant)
    run_processes(tmp_path / "two", 2, variant)
    one, two = (artifacts.load(tmp_path / name) for name in ("one", "two"))
    assert one.weights.keys() == two.weights.keys()
    for name, weight in one.weights.items():
        assert torch.allclose(weight, two.weights[name], rtol=0, atol=2e-6), name
    assert two.manifest.metrics == pytest.approx(one.manifest.metrics, rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "no checkpoint is left"


def batch() -> TrainingBatch:
    log = log_of()
    corpus = UserSequences.from_log(log, Vocabulary(log.item_ids))
    labels = np.where(np.arange(len(corpus))[:, None] % (2, 3, 5), 1.0, np.nan).astype(np.float32)
    examples = TrainingColumns.from_sequences(corpus, EventSchema(), repeats=False)
    examples.labels[:] = labels
    return make_batch(examples, corpus.offsets[:-1], np.diff(corpus.offsets), 0.1, np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_the_parts_of_a_batch_are_the_batch(count: int) -> None:
    whole = batch()
    parts = [whole.shard(rank, count) for rank in range(count)]
    assert sum(part.loss_fractions for part in parts) == pytest.approx(np.ones(4))
    assert sorted(np.concatenate([part.inputs.tokens for part in parts])) == sorted(whole.inputs.tokens)
    asked = np.concatenate([part.targets for part in parts])
    assert sorted(asked) == sorted(whole.targets)
    shown = {(target, *_seen(part, row)) for part in parts for row, target in enumerate(part.targets.tolist())}
    assert shown == {(target, *_seen(whole, row)) for row, target in enumerate(whole.targets.tolist())}
    lengths = [len(part.successors) for part in parts]
    assert max(lengths) - min(lengths) <= 16, "like lengths are dealt out in turn: nobody waits long"


def test_a_process_without_a_crop_asks_nothing() -> None:
    idle = batch().shard(rank=12, count=13)
    assert idle.loss_fractions.tolist() == [0, 0, 0, 0]
    assert len(idle.inputs) == 1


def test_one_process_alone_needs_no_variables_and_no_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as processes:
        assert processes is SINGLE_PROCESS
    assert SINGLE_PROCESS.broadcast([1.5]) == [1.5]
    one = torch.tensor([1.0])
    assert SINGLE_PROCESS.average([], one) is one


def _seen(batch: TrainingBatch, row: int) -> tuple[int, ...]:
    return tuple(batch.seen[1][batch.seen[0] == row].tolist())
