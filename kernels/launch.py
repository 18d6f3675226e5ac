"""Launches of Triton kernels, typed: Triton's own functions are typed for code inside kernels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# `max_shared_bytes` of A100, RTX 30, RTX 40, H100 and H200, by compute capability (CUDA programming guide, technical
# specifications).
SHARED_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the first tensor in `arguments`. options: kernel constants, num_warps, num_stages."""
    first_tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    with device_guard(first_tensor):
        kernel[grid](*arguments, **options)


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's GPU the current one: Triton launches on the current device, wherever its arguments are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def is_nvidia(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU, which runs PTX: torch calls AMD's "cuda", too."""
    return device.type == "cuda" and torch.version.cuda is not None


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return an NVIDIA GPU's (major, minor); (0, 0) for other devices, also those that have numbers of their own."""
    return torch.cuda.get_device_capability(device) if is_nvidia(device) else (0, 0)


def max_shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may use; the interpreter on a CPU has no limit."""
    if device.type != "cuda":
        return 1 << 31
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
