"""Tile sizes, warps and registers by device, dtype and size, and the launches of the attention kernels.

`python -m tests.benchmarks.kernels --tune` measures the configurations on the GPU at hand and prints the lines of
KERNEL_CONFIGS.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.fused_attention_layernorm.dropout import keep_scale, keep_threshold
from kernels.fused_attention_layernorm.kernel import attention_kernel, last_attention_kernel
from kernels.launch import SHARED_BYTES, compute_capability, is_nvidia, launch, max_shared_bytes, next_power_of_2

HOPPER = 9  # major compute capability
AMPERE = 8
SHORT_LENGTH = 256  # up to this many events per user the small tiles win: more programs for the multiprocessors
LAST_BLOCK_N = 128  # rows of K and V that a program of `last_attention_kernel` reads at a time
SPARE_BYTES = 2048  # shared memory that the compiler adds to a product's tiles
ROW_TILE_VALUES = 4096  # values of a tile that consists of entire rows


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Launch configuration. A tile is block_m x block_n scores.

    max_registers: per thread; 0 leaves the number to the compiler.
    """

    block_m: int
    block_n: int
    stages: int
    max_registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.block_m // 16, "num_stages": self.stages}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


SAFE_CONFIG = KernelConfig(32, 32, 1)  # 72 KiB of shared memory in float32 with 128 columns per head: fits every GPU
KERNEL_CONFIGS = {  # (major capability, bytes per element, short); only Hopper's of 2 bytes are measured
    (HOPPER, 2, False): KernelConfig(64, 32, 3),
    (HOPPER, 2, True): KernelConfig(64, 64, 2),
    (HOPPER, 4, False): KernelConfig(64, 32, 2),
    (HOPPER, 4, True): KernelConfig(64, 32, 2),
    (AMPERE, 2, False): KernelConfig(64, 64, 2),
    (AMPERE, 2, True): KernelConfig(64, 32, 2),
}


def kernel_config_for(device: torch.device, dtype: torch.dtype, max_length: int) -> KernelConfig:
    """Return the table's configuration, or one that runs on every device."""
    major, _ = compute_capability(device)
    return KERNEL_CONFIGS.get((major, dtype.itemsize, max_length <= SHORT_LENGTH), SAFE_CONFIG)


def shared_memory_bytes(config: KernelConfig, d: int, element_bytes: int) -> int:
    """Return an upper bound of the shared memory per program, forward or backward, with heads of `d` columns.

    Counts tiles of q, k, v and the gradient, and scores while they change layout.
    Compiled: at 64 x 32, float32, 128 columns, capability 8.0, 104 KiB forward and 112 KiB backward; the bound is 112.
    """
    scores = 4 * config.block_m * config.block_n
    forward = element_bytes * d * (config.block_m + 2 * config.stages * config.block_n) + scores
    backward = 2 * element_bytes * d * (config.block_m + config.block_n) + 2 * scores
    return max(forward, backward)


def fits(config: KernelConfig, d: int, element_bytes: int, device: torch.device) -> bool:
    """Whether a program's tiles fit the device's shared memory; if not, the reference runs."""
    return shared_memory_bytes(config, d, element_bytes) <= max_shared_bytes(device)


def padded_width(size: int) -> int:
    """Return the next power of two, at least 16: the smallest side of the matrix units."""
    return max(16, next_power_of_2(size))


@dataclass(frozen=True, slots=True)
class ProjectionTiles:
    """A product's tile: block_m x block_n of the result, block_k of the inner dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_registers: int = 0  # per thread; 0 leaves the number to the compiler
    programs_per_sm: int = 0  # persistent programs that loop over tiles; 0: one program per tile

    def grid(self, tiles: int, device: torch.device) -> tuple[int]:
        """Return the grid for this number of tiles."""
        if not self.programs_per_sm:
            return (tiles,)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return (min(tiles, self.programs_per_sm * processors),)

    def shrink_to(self, width: int, columns: int) -> "ProjectionTiles":
        """Return tiles no deeper than the inner dimension and no wider than the result."""
        block_k = min(self.block_k, padded_width(width))
        return replace(self, block_k=block_k, block_n=min(self.block_n, padded_width(columns)))

    def shared_bytes(self, element_bytes: int) -> int:
        """Return an upper bound per program: both factors in every stage, one tile of x and one of the result."""
        factors = self.stages * (self.block_m + self.block_n) * self.block_k
        return (factors + 2 * self.block_m * self.block_n) * element_bytes + SPARE_BYTES

    @property
    def kernel_options(self) -> dict[str, int]:
        """The kernel's constants and launch options."""
        options = {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "FLATTEN": self.programs_per_sm > 0,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


# 76,727 rows, 8 layers, one H100: in 2.73 ms, with 128 x 128 tiles 3.0 to 3.9; out 0.95 ms, with those 1.1 to 1.2.
LARGE_IN = ProjectionTiles(128, 256, 64, 8, 3, programs_per_sm=1)
LARGE_OUT = ProjectionTiles(128, 256, 64, 8, 3)
SMALL = ProjectionTiles(64, 64, 128, 4, 3)  # 256 rows: 0.039 ms, the large ones 0.083
# In half precision these use up to 209 KiB on 9.0 and 64 KiB on 8.0; float32 uses the small ones, not measured. GPUs
# with less than A100's shared memory use the following, not measured either: at most 68 KiB of 99 (compiled for 8.6,
# 9.0 and 12.0).
LOW_MEMORY = ProjectionTiles(64, 64, 64, 4, 2)
A100_SHARED_BYTES = SHARED_BYTES[8, 0]
# With more rows projection_hopper.py wins: 600 rows 0.061 ms (with two groups), SMALL 0.074; 256 rows 0.059, 0.039.
HOPPER_ROWS = 512
SMALL_ROWS = 2048  # with no more rows, large tiles would leave multiprocessors idle


def projection_tiles_for(
    rows: int, large: ProjectionTiles, element_bytes: int, available_bytes: int
) -> ProjectionTiles:
    """Choose tiles for a product of `rows` rows. available_bytes: shared memory per program."""
    if element_bytes > 2:
        return SMALL if SMALL.shared_bytes(element_bytes) <= available_bytes else LOW_MEMORY
    if available_bytes < A100_SHARED_BYTES:
        return LOW_MEMORY
    return large if rows > SMALL_ROWS else SMALL


def dot_precision(dtype: torch.dtype) -> str:
    """Return `input_precision` of the products: float32 stays float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tile_descriptor(x: Tensor, block_m: int, block_n: int) -> TensorDescriptor:
    """Return the descriptor by which the copy engine reads x, 2-D with rows aligned to 16 bytes, in tiles."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block_m, block_n])


def attn_out_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of attention's result before its norm: A V / N would underflow in float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def or_placeholder(argument: Tensor | None, placeholder: Tensor) -> Tensor:
    """Return the argument, or any other tensor in place of one that the kernel does not read."""
    return placeholder if argument is None else argument


def can_use_ptx(q: Tensor) -> bool:
    """Whether the kernels use PTX for the special function unit: in half precision on an NVIDIA GPU."""
    return is_nvidia(q.device) and q.dtype != torch.float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    row_blocks: Tensor,
    time_buckets: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    alpha: float,
    scale: float,
    num_contextual: int,
    config: KernelConfig,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return A V / N [total, heads * d_v] and its row statistics float32 [total, heads, 2].

    q, k, v: [total, heads, d], row strides multiples of 16 bytes, d a power of two of at least 16.
    scale: of the result, 1 / N. seed: int64 [], required with dropout.
    Rows beyond a user's first `position_bias.shape[1]` are not written.
    """
    total, heads, d_qk = q.shape
    d_v = v.shape[2]
    attn_out = q.new_empty((total, heads * d_v), dtype=attn_out_dtype(q.dtype))
    row_stats = q.new_empty((total, heads, 2), dtype=torch.float32)
    if len(row_blocks) and total:
        q, k, v = (part.flatten(1) for part in (q, k, v))
        launch(
            attention_kernel, (heads * len(row_blocks),),
            tile_descriptor(q, config.block_m, d_qk), tile_descriptor(k, config.block_n, d_qk),
            tile_descriptor(v, config.block_n, d_v), attn_out, row_stats, row_blocks, offsets,
            time_buckets, position_bias, time_bias, or_placeholder(seed, offsets), alpha,
            scale * keep_scale(dropout), position_bias.shape[1],
            HEADS=heads, D_QK=d_qk, D_V=d_v, TIME_BUCKETS=time_bias.shape[1], BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, NUM_CONTEXTUAL=num_contextual, KEEP_THRESHOLD=keep_threshold(dropout),
            USE_PTX=can_use_ptx(q), PRECISION=dot_precision(q.dtype), **config.options,
        )  # fmt: skip
    return attn_out, row_stats


def attend_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    alpha: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `attend` of each user's last row only: [users, heads * d_v] and row statistics. q: [users, heads, d]."""
    users, heads, d_qk = q.shape
    d_v = v.shape[2]
    attn_out = q.new_empty((users, heads * d_v), dtype=attn_out_dtype(q.dtype))
    row_stats = q.new_empty((users, heads, 2), dtype=torch.float32)
    if users:
        launch(
            last_attention_kernel, (heads * users,),
            q, k, v, attn_out, row_stats, offsets, seconds, thresholds, position_bias, time_bias,
            q.stride(0), k.stride(0), v.stride(0), alpha, scale, position_bias.shape[1],
            HEADS=heads, D_QK=d_qk, D_V=d_v, BLOCK_QK=padded_width(d_qk), BLOCK_V=padded_width(d_v),
            TIME_BUCKETS=time_bias.shape[1], BLOCK_N=LAST_BLOCK_N, USE_PTX=can_use_ptx(q), num_warps=8,
        )  # fmt: skip
    return attn_out, row_stats
