"""Two processes train the same weights as one. They are started by the variables that torchrun sets."""

import multiprocessing
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
from pipeline.features.labels import LabelRules
from pipeline.items.vocabulary import Vocabulary
from pipeline.model import heads
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions
from pipeline.training import losses
from pipeline.training.batches import TrainingBatch, TrainingColumns, make_batch
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup, process_group
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.callbacks import SilentCallback

ROOT = Path(__file__).parents[3]
# Without dropout, which each process draws for its own shard. AdamW divides by what is near 0 in its first steps, so
# the last bits of a sum show: the fewer steps the less.
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=2, crop_length=8, events_per_batch=64, weighting="uncertainty"),
    HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=8, dropout=0.0, attention_dropout=0.0),
)
VARIANTS = {
    "events": OPTIONS,
    "sessions": replace(OPTIONS, model=replace(OPTIONS.model, recent_events=4, history_events=16)),
    "sampled-softmax": OPTIONS,
}


def random_log(users: int = 12) -> EventLog:
    rng = np.random.default_rng(0)
    actions = ("view", "click", "cart")
    events = [
        Event(f"u{user}", f"i{rng.integers(30)}", actions[rng.integers(3)], 60_000 * step + user)
        for user in range(users)
        for step in range(5 + user)
    ]
    return event_log_from_blocks([events], EventSchema())


def train_variants(folder: Path, group: ProcessGroup) -> None:
    """Train one artifact per variant, in every process of the group."""
    pipeline = PipelineOptions(device="cpu", threads=1)
    for variant, options in VARIANTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "DROPOUT", 0.0)
            if variant == "sampled-softmax":
                patch.setattr(losses, "FULL_SOFTMAX_ITEMS", 0)
                patch.setattr(losses, "UNIFORM_NEGATIVES", 8)
            train(random_log(), folder / variant, options, pipeline, SilentCallback(), created="", group=group)


def run_rank(folder: str, rank: int) -> None:
    os.environ["RANK"] = str(rank)
    with process_group(torch.device("cpu")) as group:
        train_variants(Path(folder), group)


def run_two_ranks(folder: str) -> None:
    """Fork both ranks from one fresh interpreter, so that they share its import of torch, which costs seconds."""
    import torch._dynamo  # noqa: F401 - an optimizer imports it, too

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(folder, rank), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-process")
    train_variants(folder, SINGLE_PROCESS)
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment = {**os.environ, **rendezvous, "OMP_NUM_THREADS": "1"}
    code = f"from {__name__} import run_two_ranks; run_two_ranks({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, timeout=150, check=True)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_the_weights_of_one(one_process: Path, two_processes: Path, variant: str) -> None:
    one = artifacts.load(one_process / variant)
    two = artifacts.load(two_processes / variant)
    assert one.weights.keys() == two.weights.keys()
    for name, weight in one.weights.items():
        assert torch.allclose(weight, two.weights[name], rtol=0, atol=2e-6), name
    assert two.manifest.metrics == pytest.approx(one.manifest.metrics, rel=1e-4)


def test_main_process_alone_writes_and_leaves_no_checkpoint(one_process: Path, two_processes: Path) -> None:
    for folder in (one_process, two_processes):
        assert sorted(path.name for path in folder.iterdir()) == sorted(VARIANTS)


@pytest.fixture(scope="module")
def full_batch() -> TrainingBatch:
    log = random_log()
    sequences = UserSequences.from_log(log, Vocabulary(log.item_ids))
    rules = LabelRules.from_options(EventSchema())
    columns = TrainingColumns.from_sequences(sequences, rules, Exclusion(), ring_events=512)
    columns.labels[:] = np.where(np.arange(len(sequences))[:, None] % (2, 3, 5), 1.0, np.nan)
    offsets = sequences.offsets
    return make_batch(columns, offsets[:-1], np.diff(offsets), 0.1, np.random.default_rng(0))


def seen_by_target(batch: TrainingBatch) -> set[tuple[int, ...]]:
    """Return each target with the tokens that its row has seen."""
    targets, tokens = batch.excluded
    return {(target, *tokens[targets == index].tolist()) for index, target in enumerate(batch.targets.tolist())}


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_shards_add_up_to_the_batch(full_batch: TrainingBatch, count: int) -> None:
    shards = [full_batch.shard(rank, count) for rank in range(count)]
    assert sum(shard.loss_fractions for shard in shards) == pytest.approx(np.ones(4))
    assert sorted(np.concatenate([shard.inputs.item_rows for shard in shards])) == sorted(full_batch.inputs.item_rows)
    assert sorted(np.concatenate([shard.targets for shard in shards])) == sorted(full_batch.targets)
    assert set.union(*(seen_by_target(shard) for shard in shards)) == seen_by_target(full_batch)
    lengths = [len(shard.successors) for shard in shards]
    assert max(lengths) - min(lengths) <= 16, "crops of similar length are dealt in turn: no process waits long"


def test_shard_without_a_crop_trains_nothing(full_batch: TrainingBatch) -> None:
    idle = full_batch.shard(rank=12, count=13)
    assert idle.loss_fractions.tolist() == [0, 0, 0, 0]
    assert len(idle.inputs) == 1


def test_single_process_needs_no_variables_and_sends_no_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as group:
        assert group is SINGLE_PROCESS
    assert SINGLE_PROCESS.broadcast([1.5]) == [1.5]
    losses = torch.tensor([1.0])
    assert SINGLE_PROCESS.average([], losses) is losses
