"""What a batch costs the torch backend on a GPU, from columns in the host's memory to states on the device: eager, by
kernels without graphs, and by CUDA graphs. Times are the host's, to the end of the device's work.

    python -m tests.benchmarks.encoding       writes results/encoding_h100.json, or _h200
"""

import time

import numpy as np
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.backends import GraphOptions
from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.model.config import PRESETS
from pipeline.records import EventSchema
from pipeline.training.trainer import MultiTaskModel
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, host_ms, median_ms, named, row

ITEMS, ROUNDS = 20_000, 30
USERS, LONGEST, MAX_EVENTS = (1, 64, 256), 200, 32_768
COUNTERS = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}


def artifact_of(preset: str) -> artifacts.Artifact:
    """An untrained model's."""
    config = replace(PRESETS[preset], items=ITEMS, max_events=LONGEST, content_rows=0)
    ids = [f"i{number}" for number in range(1, ITEMS)]
    return artifacts.draft(config, EventSchema(), MultiTaskModel(config).state_dict(), ids, COUNTERS)


def inputs_of(users: int) -> EncoderInputs:
    """Lengths as real histories have them: log-normal, few of them long."""
    random = np.random.default_rng(users)
    lengths = np.clip(random.lognormal(4.0, 1.0, users), 1, LONGEST).astype(np.int64) if users > 1 else [LONGEST]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    seconds = np.concatenate([np.cumsum(random.integers(0, 5000, length)) for length in lengths])
    codes = random.integers(0, N_FEATURE_IDS, (total, N_FEATURES)).astype(np.int32)
    return EncoderInputs(random.integers(1, ITEMS, total).astype(np.int32), codes, seconds.astype(np.int32), offsets)


def measure(preset: str) -> list[Row]:
    artifact = artifact_of(preset)
    eager = TorchEncoder(artifact, "cuda")
    launched = TorchEncoder(artifact, "cuda", graphs=GraphOptions(budget_mib=0))
    captured = TorchEncoder(artifact, "cuda", graphs=GraphOptions(max(USERS), MAX_EVENTS))
    start = time.perf_counter()
    graphs = captured.warm()
    made_ms = 1e3 * (time.perf_counter() - start)
    rows = [row(preset, f"graphs: {graphs} made", made_ms, 0, None, None)]
    for users in USERS:
        inputs = inputs_of(users)
        name, wanted = f"{preset}: {users} users, {len(inputs.tokens):,} events", eager.encode(inputs)
        for how, encoder in (("torch: eager", eager), ("kernels", launched), ("kernels: graph", captured)):
            error = round(float((encoder.encode(inputs) - wanted).norm() / wanted.norm()), 5)
            ms = host_ms(lambda encoder=encoder, inputs=inputs: encoder.encode(inputs), ROUNDS)
            rows.append(row(name, how, ms, users, None, error))
    return rows


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    rows = [each for preset in ("tiny", "10m") for each in measure(preset)]
    times = {(each["workload"], each["implementation"]): median_ms(each) for each in rows}
    metrics = {}
    for (work, how), ms in times.items():
        if how == "kernels: graph":
            name = str(work).partition(" users")[0].replace(": ", "_")
            metrics |= {f"{name}_ms": ms, f"{name}_speedup": round(times[work, "torch: eager"] / ms, 1)}
    print(results.write(named("encoding"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
