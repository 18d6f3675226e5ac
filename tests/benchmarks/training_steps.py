"""A training step of the encoder on a GPU, forward and backward: attention in torch and on this project's kernels.

torch works on padded blocks. Times are the host's, to the end of the device's work.

usage: python -m tests.benchmarks.training_steps [--out FOLDER]       writes training_steps_h100.json, or _h200
"""

from collections.abc import Callable
from functools import partial

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
from tests.benchmarks.kernel_rows import Row, arguments, card_name, host_ms, ratio, row

MAX_LENGTH = 200
ROUNDS = 9
RNG = np.random.default_rng(0)
LENGTHS = {  # of users, as crops of real histories have them
    "many short": RNG.geometric(0.4, 6000).clip(1, MAX_LENGTH),
    "log-normal": RNG.lognormal(4.0, 1.0, 160).clip(1, MAX_LENGTH).astype(int),
    "all long": np.full(80, MAX_LENGTH),
}
Layout = PaddedBlocks | AttentionPlan


def make_inputs(lengths: np.ndarray) -> EncoderInputs:
    seconds = np.concatenate([np.cumsum(RNG.integers(0, 9000, length)) for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return EncoderInputs(np.zeros(0, np.int32), np.zeros((0, 0), np.int32), seconds.astype(np.int32), offsets)


def measure(hstu: Hstu, name: str, lengths: np.ndarray, dtype: torch.dtype) -> list[Row]:
    inputs = make_inputs(lengths)
    x = torch.randn(int(lengths.sum()), hstu.config.width, device="cuda", requires_grad=True)
    is_half = dtype == torch.bfloat16

    def step(make_layout: Callable[[], Layout]) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=is_half):
            states: Tensor = hstu(x, make_layout())
        states.square().sum().backward()

    implementations: dict[str, Callable[[], Layout]] = {
        "torch": lambda: PaddedBlocks.from_inputs(inputs, "cuda"),
        "kernels": lambda: attention_plan(inputs, MAX_LENGTH, dtype, x.device),
    }
    workload = f"{name}, {'bfloat16' if is_half else 'float32'}: {len(lengths):,} users, {len(x):,} events"
    return [
        row(workload, implementation, host_ms(partial(step, make_layout), ROUNDS), len(lengths), None, None)
        for implementation, make_layout in implementations.items()
    ]


def main() -> None:
    args = arguments(__doc__)
    rows: list[Row] = []
    for preset in ("tiny", "10m"):
        config = replace(PRESETS[preset], items=1, max_events=MAX_LENGTH, content_rows=0)
        hstu = Hstu(config).cuda().train()
        for name, lengths in LENGTHS.items():
            for dtype in (torch.bfloat16, torch.float32):
                if preset == "tiny" or dtype == torch.bfloat16 or name == "log-normal":  # the others take minutes
                    rows += measure(hstu, f"{preset}, {name}", lengths, dtype)
    metrics = {}
    for torch_row, kernels_row in zip(rows[::2], rows[1::2], strict=True):
        name = str(torch_row["workload"]).partition(":")[0]
        name = name.replace(", ", "_").replace(" ", "_").replace("-", "_")
        metrics[name] = round(ratio(torch_row, kernels_row), 2)
    print(results.write(card_name("training_steps"), metrics, rows, args.out))


if __name__ == "__main__":
    main()
