"""What every launch needs, typed: Triton's own functions are typed for the code inside kernels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# What `shared_bytes_of` says of A100, RTX 30, RTX 40, H100 and H200, by capability (CUDA programming guide, technical
# specifications).
SHARED_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """On the device of the first tensor among `arguments`. `options`: the kernel's constants, num_warps, num_stages."""
    with device_of(next(part for part in arguments if isinstance(part, Tensor))):
        kernel[grid](*arguments, **options)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes x's GPU the current one: Triton launches there, whatever its arguments' device is."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def shared_bytes_of(device: torch.device) -> int:
    """That a program may take; the interpreter on a CPU knows no bound."""
    if device.type != "cuda":
        return 1 << 31
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
