"""What the operators check at their doors."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
MAX_ROWS = 2**31 - 2**16  # of a call: a row's number, and that of one a few tiles further, is an int32


def require(holds: bool, name: str, value: Tensor, wanted: str) -> None:
    """Raises ValueError that names the argument, what it is and what was wanted."""
    if not holds:
        raise ValueError(f"{name} is {value.dtype} {list(value.shape)} on {value.device}, wanted {wanted}")


def require_values(name: str, value: Tensor, faults: dict[str, Tensor]) -> None:
    """faults: what would be wrong -> a bool tensor of one element; each waits for the device.

    Raises ValueError that names the argument, its shape and the first fault.
    """
    for fault, found in faults.items():
        if bool(found):
            raise ValueError(f"{name} {list(value.shape)} {fault}")


def offset_faults(offsets: Tensor, end: int) -> dict[str, Tensor]:
    """Of offsets that cut `end` rows into one range a user."""
    return {
        f"must begin with 0 and end with {end}": (offsets[0] != 0) | (offsets[-1] != end),
        "must not decrease": (offsets.diff() < 0).any(),
    }
