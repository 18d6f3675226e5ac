"""How the kernels are launched: tiles, warps and registers by device, dtype and length, and the launches themselves.

`python -m tests.benchmarks.kernels --tune` measures and prints the lines of the table for the card at hand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fused_attention_layernorm.dropout import kept_of, weight_of
from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.gate_norm import gate_backward_kernel, gate_kernel
from kernels.fused_attention_layernorm.kernel import attention_kernel, last_attention_kernel
from kernels.launch import ceil_div, next_power_of_2, shared_bytes_of
from kernels.launch import launch as run

HOPPER, AMPERE = 9, 8
SHORT = 256  # up to this many events a user the small tiles win: more programs for the multiprocessors
LAST_COLUMNS = 128  # rows of K and V that a program of the newest row reads at a time


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """A row block is `rows` x `columns`; `registers`: the most a thread may take, 0: the compiler's choice."""

    rows: int
    columns: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.rows // 16, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


SAFE = KernelConfig(32, 32, 1)  # 72 KiB of shared memory in float32 at 128 columns a head: runs everywhere
LAUNCHES = {  # (device's major capability, bytes of an element, short); measured: Hopper's of 1 and 2 bytes
    (HOPPER, 2, False): KernelConfig(64, 32, 3),
    (HOPPER, 2, True): KernelConfig(64, 64, 2),
    (HOPPER, 1, False): KernelConfig(64, 32, 3),
    (HOPPER, 1, True): KernelConfig(64, 64, 3),
    (HOPPER, 4, False): KernelConfig(64, 32, 2),
    (HOPPER, 4, True): KernelConfig(64, 32, 2),
    (AMPERE, 2, False): KernelConfig(64, 64, 2),
    (AMPERE, 2, True): KernelConfig(64, 32, 2),
}


def kernel_config_for(device: torch.device, dtype: torch.dtype, max_length: int) -> KernelConfig:
    """The table's choice, or one that runs on every device."""
    if device.type != "cuda":
        return SAFE
    major = torch.cuda.get_device_capability(device)[0]
    return LAUNCHES.get((major, dtype.itemsize, max_length <= SHORT), SAFE)


def shared_bytes(launch: KernelConfig, d: int, element_bytes: int) -> int:
    """No program takes more, forward or backward, with heads of `d` columns: tiles of q, k, v and the gradient, and
    scores on their way between layouts.

    Compiled: at 64 x 32, float32, 128 columns, capability 8.0, 104 KiB forward and 112 KiB backward, of these 112.
    """
    scores = 4 * launch.rows * launch.columns
    forward = element_bytes * d * (launch.rows + 2 * launch.stages * launch.columns) + scores
    return max(forward, 2 * element_bytes * d * (launch.rows + launch.columns) + 2 * scores)


def fits(launch: KernelConfig, d: int, element_bytes: int, device: torch.device) -> bool:
    """Whether a program's tiles fit the device's shared memory; where they do not, the reference answers."""
    return shared_bytes(launch, d, element_bytes) <= shared_bytes_of(device)


def padded(size: int) -> int:
    """The matrix units' smallest side is 16."""
    return max(16, next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """Of products: float32 stays float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tiled(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A 2-D tensor as the copy engine reads it, in tiles; its rows begin at multiples of 16 bytes."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def between(dtype: torch.dtype) -> torch.dtype:
    """The type in which attention's result waits for its norm: A V / N would underflow in float16."""
    return torch.bfloat16 if dtype in (torch.bfloat16, FP8) else torch.float32


def given(argument: Tensor | None, other: Tensor) -> Tensor:
    """A kernel that does not read an argument gets some other tensor."""
    return other if argument is None else argument


def attend(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, targets: Tensor | None, items: Tensor, buckets: Tensor,
    position_bias: Tensor, time_bias: Tensor, alpha: float, scale: float, contextual: int, launch: KernelConfig,
    seed: Tensor | None = None, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k, v: [total, heads, d], rows of any stride that divides by 16 bytes, d a power of two of at least 16.
    scale: 1 / N, of the result, and in FP8 V's scale. seed: int64 [], if there is dropout.

    -> A V / N [total, heads * d_v] and its moments float32 [total, heads, 2]. Rows beyond a user's first
    `position_bias.shape[1]` stay unwritten.
    """
    (total, heads, d_qk), d_v = q.shape, v.shape[2]
    attended = q.new_empty((total, heads * d_v), dtype=between(q.dtype))
    moments = q.new_empty((total, heads, 2), dtype=torch.float32)
    if len(items) and total:
        q, k, v = (part.flatten(1) for part in (q, k, v))
        run(
            attention_kernel, (heads * len(items),),
            tiled(q, launch.rows, d_qk), tiled(k, launch.columns, d_qk), tiled(v, launch.columns, d_v), attended,
            moments, items, offsets, given(targets, offsets), buckets, position_bias, time_bias, given(seed, offsets),
            alpha, scale * weight_of(dropout), position_bias.shape[1],
            HEADS=heads, D_QK=d_qk, D_V=d_v, TIMES=time_bias.shape[1], ROWS=launch.rows, COLUMNS=launch.columns,
            CONTEXTUAL=contextual, HAS_TARGETS=targets is not None, KEPT=kept_of(dropout), FAST=fast(q),
            PRECISION=precision(q.dtype), **launch.options,
        )  # fmt: skip
    return attended, moments


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, seconds: Tensor, offsets: Tensor, thresholds: Tensor,
    position_bias: Tensor, time_bias: Tensor, alpha: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attend`, of each user's newest row alone; q: [users, heads, d] -> [users, heads * d_v] and moments."""
    (users, heads, d_qk), d_v = q.shape, v.shape[2]
    attended = q.new_empty((users, heads * d_v), dtype=between(q.dtype))
    moments = q.new_empty((users, heads, 2), dtype=torch.float32)
    if users:
        run(
            last_attention_kernel, (heads * users,),
            q, k, v, attended, moments, offsets, seconds, thresholds, position_bias, time_bias,
            q.stride(0), k.stride(0), v.stride(0), alpha, scale, position_bias.shape[1],
            HEADS=heads, D_QK=d_qk, D_V=d_v, BLOCK_QK=padded(d_qk), BLOCK_V=padded(d_v), TIMES=time_bias.shape[1],
            COLUMNS=LAST_COLUMNS, FAST=fast(q), num_warps=8,
        )  # fmt: skip
    return attended, moments


def fast(q: Tensor) -> bool:
    """PTX for the special unit: half precision, on a GPU."""
    return q.is_cuda and q.dtype != torch.float32


def normalise_and_gate(
    attended: Tensor, moments: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """attended: [rows, width], u: [rows, width], rows of any stride -> U * LayerNorm(O) [rows, width] in u's dtype."""
    rows, width = attended.shape
    out = u.new_empty((rows, width))
    group = max(1, 4096 // padded(width))
    if rows:
        run(
            gate_kernel, (ceil_div(rows, group),),
            attended, moments, u, weight, bias, out, rows, u.stride(0), eps,
            HEADS=moments.shape[1], WIDTH=width, BLOCK=padded(width), GROUP=group, num_warps=4,
        )  # fmt: skip
    return out


def gate_backward(
    grad: Tensor, attended: Tensor, moments: Tensor, u: Tensor, weight: Tensor, bias: Tensor, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """scale: what `attend` multiplied A V by -> the gradient of its result, times `scale`, in u's dtype; those of u,
    weight and bias."""
    rows, width = attended.shape
    group, programs = max(1, 2048 // padded(width)), 264
    below, grad_u = u.new_empty((rows, width)), u.new_empty((rows, width))
    partial = u.new_zeros((programs, 2, width), dtype=torch.float32)
    if rows:
        run(
            gate_backward_kernel, (programs,), grad, attended, moments, u, weight, bias, below, grad_u, partial, rows,
            u.stride(0), eps, scale, HEADS=moments.shape[1], WIDTH=width, BLOCK=padded(width), GROUP=group,
            num_warps=4,
        )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0)
    return below, grad_u, grad_weight.clone(), grad_bias.clone()
