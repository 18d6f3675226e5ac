"""What every launch needs, typed: Triton's own functions are typed for the code inside kernels."""

from typing import Any

# Bytes of shared memory that one program may take, by device capability (CUDA programming guide, technical
# specifications): A100, RTX 30, RTX 40, H100 and H200.
SHARED_BYTES = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`options`: the kernel's constants, num_warps, num_stages."""
    kernel[grid](*arguments, **options)


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
