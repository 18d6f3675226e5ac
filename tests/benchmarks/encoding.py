"""Time of the torch backend for a batch on a GPU, from columns in the host's memory to states on the device.

Eager torch, kernels without graphs, and CUDA graphs. Times are the host's, to the end of the device's work.

usage: python -m tests.benchmarks.encoding [--out FOLDER]       writes encoding_h100.json, or _h200
"""

import time
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline.backends.encoder import Encoder, EncoderBatch, GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.backends.item_table import ItemTable
from pipeline.backends.staging import Staging
from pipeline.backends.torch import TorchEncoder, TorchModel
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import PRESETS
from pipeline.records import EventSchema
from pipeline.training.multi_task_model import MultiTaskModel
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, card_name, host_ms, median_ms, row

ITEMS = 20_000
ROUNDS = 30
USERS = (1, 64, 256)
MAX_LENGTH = 200
MAX_EVENTS = 32_768
COUNTERS = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}


def make_artifact(preset: str) -> artifacts.Artifact:
    """Return the artifact of an untrained model."""
    config = replace(PRESETS[preset], items=ITEMS, max_events=MAX_LENGTH, content_rows=0)
    ids = [f"i{number}" for number in range(1, ITEMS)]
    return artifacts.draft(config, EventSchema(), MultiTaskModel(config).state_dict(), ids, COUNTERS)


def make_inputs(users: int) -> EncoderInputs:
    """Draw lengths as real histories have them: log-normal, few of them long."""
    rng = np.random.default_rng(users)
    lengths = np.clip(rng.lognormal(4.0, 1.0, users), 1, MAX_LENGTH).astype(np.int64) if users > 1 else [MAX_LENGTH]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    seconds = np.concatenate([np.cumsum(rng.integers(0, 5000, length)) for length in lengths])
    feature_ids = rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES)).astype(np.int32)
    tokens = rng.integers(1, ITEMS, total).astype(np.int32)
    return EncoderInputs(tokens, feature_ids, seconds.astype(np.int32), offsets)


@torch.inference_mode()
def encode(encoder: Encoder, stage: Staging, inputs: EncoderInputs) -> Tensor:
    """Return the states of a batch whose columns are in the host's memory."""
    return encoder.encode(EncoderBatch.from_inputs(inputs, stage))


def measure(preset: str) -> list[Row]:
    artifact = make_artifact(preset)
    model = TorchModel.from_artifact(artifact, "cuda")
    table = ItemTable(artifact, Catalogue(Vocabulary(artifact.item_ids)), model.hstu.items, model.device)
    eager = TorchEncoder(model.hstu, table)
    kernels = FusedEncoder(model.hstu, table, torch.bfloat16, GraphOptions(budget_mib=0))
    graphs = FusedEncoder(model.hstu, table, torch.bfloat16, GraphOptions(max(USERS), MAX_EVENTS))
    stage = Staging(model.device)
    start = time.perf_counter()
    captured = graphs.warm()
    capture_ms = 1e3 * (time.perf_counter() - start)
    rows = [row(preset, f"graphs: {captured} made", capture_ms, 0, None, None)]
    for users in USERS:
        inputs = make_inputs(users)
        name = f"{preset}: {users} users, {inputs.offsets[-1]:,} events"
        expected = encode(eager, stage, inputs)
        for implementation, encoder in (("torch: eager", eager), ("kernels", kernels), ("kernels: graph", graphs)):
            error = round(float((encode(encoder, stage, inputs) - expected).norm() / expected.norm()), 5)
            ms = host_ms(partial(encode, encoder, stage, inputs), ROUNDS)
            rows.append(row(name, implementation, ms, users, None, error))
    return rows


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    rows = [each for preset in ("tiny", "10m") for each in measure(preset)]
    times = {(each["workload"], each["implementation"]): median_ms(each) for each in rows}
    metrics: dict[str, float] = {}
    for (workload, implementation), ms in times.items():
        if implementation == "kernels: graph":
            name = str(workload).partition(" users")[0].replace(": ", "_")
            metrics |= {f"{name}_ms": ms, f"{name}_speedup": round(times[workload, "torch: eager"] / ms, 1)}
    print(results.write(card_name("encoding"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
