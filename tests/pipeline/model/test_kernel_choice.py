"""Training takes the kernels where the measured steps say that they are faster, and torch elsewhere."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from pipeline.model.config import PRESETS
from pipeline.model.hstu import trains_faster

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "training_steps_h200.json"
ROWS = msgspec.json.decode(RESULT.read_bytes())["rows"]
WORKLOAD = re.compile(r"(\w+), ([\w\- ]+), (\w+): ([\d,]+) users, ([\d,]+) events")
PAIRS = zip(ROWS[::2], ROWS[1::2], strict=True)  # torch, kernels
MEASURED = [(one["workload"], one["median_ms"], other["median_ms"]) for one, other in PAIRS]


@pytest.mark.parametrize(("workload", "torch_ms", "kernels_ms"), MEASURED, ids=[each[0] for each in MEASURED])
def test_choice_follows_the_measured_training_steps(workload: str, torch_ms: float, kernels_ms: float) -> None:
    match = WORKLOAD.fullmatch(workload)
    assert match
    preset, _, dtype, users, events = match.groups()
    offsets = np.linspace(0, int(events.replace(",", "")), int(users.replace(",", "")) + 1).astype(np.int64)
    assert trains_faster(PRESETS[preset], getattr(torch, dtype), offsets) == (kernels_ms < torch_ms)
