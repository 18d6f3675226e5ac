"""Argument checks that the operators share. All raise ValueError."""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT_DTYPES = (torch.int32, torch.int64)
MAX_ROWS = 2**31 - 2**16  # per call: a row index, and one a few tiles past it, must fit an int32


def require(condition: bool, name: str, value: Tensor, expected: str) -> None:
    """Raise ValueError that names the argument, its dtype, shape and device, and what was expected."""
    if not condition:
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)} on {value.device}, expected {expected}")


def require_values(name: str, value: Tensor, faults: dict[str, Tensor]) -> None:
    """Raise ValueError that names the argument, its shape and the first fault found.

    faults: description of a fault -> bool tensor of one element, true if present. Reading each waits for the device.
    """
    for fault, found in faults.items():
        if bool(found):
            raise ValueError(f"{name} {list(value.shape)} {fault}")


def offset_faults(offsets: Tensor, end: int) -> dict[str, Tensor]:
    """Return the faults of offsets that must split `end` rows into one range per user, for `require_values`."""
    return {
        f"must begin with 0 and end with {end}": (offsets[0] != 0) | (offsets[-1] != end),
        "must not decrease": (offsets.diff() < 0).any(),
    }
