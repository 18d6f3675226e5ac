"""A training step of the encoder on a GPU, forward and backward: attention by torch on padded blocks, and by this
project's kernels.

    python -m tests.benchmarks.training_steps       writes results/training_steps_h100.json, or _h200
"""

from collections.abc import Callable

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.fused_attention_layernorm.plan import AttentionPlan
from pipeline.features.event_features import EncoderInputs
from pipeline.model.config import PRESETS
from pipeline.model.hstu import Hstu, attention_plan
from pipeline.model.padding import PaddedBlocks
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, arguments, host_ms, named, row

LONGEST, ROUNDS = 200, 9
RANDOM = np.random.default_rng(0)
USERS = {  # lengths, as crops of real histories have them
    "many short": RANDOM.geometric(0.4, 6000).clip(1, LONGEST),
    "log-normal": RANDOM.lognormal(4.0, 1.0, 160).clip(1, LONGEST).astype(int),
    "all long": np.full(80, LONGEST),
}


def inputs_of(lengths: np.ndarray) -> EncoderInputs:
    seconds = np.concatenate([np.cumsum(RANDOM.integers(0, 9000, length)) for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return EncoderInputs(np.zeros(0, np.int32), np.zeros((0, 0), np.int32), seconds.astype(np.int32), offsets)


def measure(hstu: Hstu, name: str, lengths: np.ndarray, dtype: torch.dtype) -> list[Row]:
    inputs = inputs_of(lengths)
    rows = torch.randn(int(lengths.sum()), hstu.config.width, device="cuda", requires_grad=True)
    half = dtype == torch.bfloat16

    def step(layout_of: Callable[[], PaddedBlocks | AttentionPlan]) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            states: Tensor = hstu(rows, layout_of())
        states.square().sum().backward()

    ways: dict[str, Callable[[], PaddedBlocks | AttentionPlan]] = {
        "torch": lambda: PaddedBlocks.from_inputs(inputs, "cuda"),
        "kernels": lambda: attention_plan(inputs, LONGEST, dtype, rows.device),
    }
    work = f"{name}, {'bfloat16' if half else 'float32'}: {len(lengths):,} users, {len(rows):,} events"
    return [
        row(work, way, host_ms(lambda layout_of=layout_of: step(layout_of), ROUNDS), len(lengths), None, None)
        for way, layout_of in ways.items()
    ]


def main() -> None:
    args = arguments(__doc__)
    rows = []
    for preset in ("tiny", "10m"):
        config = replace(PRESETS[preset], items=1, max_events=LONGEST, content_rows=0)
        hstu = Hstu(config).cuda().train()
        for name, lengths in USERS.items():
            for dtype in (torch.bfloat16, torch.float32):
                if preset == "tiny" or dtype == torch.bfloat16 or name == "log-normal":  # the others take minutes
                    rows += measure(hstu, f"{preset}, {name}", lengths, dtype)
    times = [float(str(each["median_ms"])) for each in rows]
    metrics = {
        str(of_torch["workload"]).partition(":")[0].replace(", ", "_").replace(" ", "_").replace("-", "_"): slow / fast
        for of_torch, slow, fast in zip(rows[::2], times[::2], times[1::2], strict=True)
    }
    print(results.write(named("training_steps"), {name: round(x, 2) for name, x in metrics.items()}, rows, args.out))


if __name__ == "__main__":
    main()
