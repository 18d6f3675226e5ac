"""What every launch needs, typed: Triton's own functions are typed for the code inside kernels."""

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`options`: the kernel's constants, num_warps, num_stages."""
    kernel[grid](*arguments, **options)


def ceil_div(n: int, step: int) -> int:
    return -(-n // step)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
