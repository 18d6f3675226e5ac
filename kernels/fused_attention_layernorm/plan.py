"""A packed batch prepared for attention: checked once, its row blocks and time buckets shared by all layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm import validation
from kernels.fused_attention_layernorm.launch import KernelConfig, kernel_config_for
from kernels.fused_attention_layernorm.plan_kernels import (
    fill_row_blocks,
    fill_time_buckets,
    max_row_blocks,
    max_tiles,
)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Inputs of attention that depend on the batch, not on the layer; `from_batch` builds it.

    offsets: int32 [users + 1]; seconds: int32 [total]; thresholds: int32 [times - 1].
    row_blocks: int32 [blocks, 4], see row_block_kernel; time_buckets: uint8 [tiles * block_m * block_n] of `config`;
    both are empty without `kernels`, when the reference runs.
    """

    offsets: Tensor
    seconds: Tensor
    thresholds: Tensor
    row_blocks: Tensor
    time_buckets: Tensor
    num_contextual: int
    max_length: int
    config: KernelConfig
    kernels: bool

    @classmethod
    def from_batch(
        cls,
        seconds: Tensor,
        offsets: Tensor,
        thresholds: Tensor,
        max_length: int,
        dtype: torch.dtype,
        num_contextual: int = 0,
        *,
        config: KernelConfig | None = None,
        kernels: bool | None = None,
        trusted: bool = False,
    ) -> "AttentionPlan":
        """Return the plan of users whose rows follow each other.

        seconds: int32 [total], event times, ascending within a user, less than 2^31 s apart; offsets: int32 or int64
        [users + 1]; thresholds: int32 [times - 1], ascending, at most 255; max_length: upper bound of the users'
        lengths; dtype: of q, k, v.
        num_contextual: how many first rows describe the user and see all rows.
        config: replaces the table's choice. kernels: whether to use them, by default on a GPU only; on a CPU they need
        Triton's interpreter.
        trusted: do not check values or wait for the device, for CUDA graphs and torch.compile. Rows beyond
        `max_length` of a longer user are then not written.

        Raises ValueError that names the argument, its shape, and what was expected.
        """
        validation.check_plan(dtype, max_length, num_contextual)
        validation.check_batch(seconds, offsets, thresholds)
        if not trusted:
            validation.check_values(seconds, offsets, thresholds, max_length)
        config = config or kernel_config_for(seconds.device, dtype, max_length)
        kernels = seconds.is_cuda if kernels is None else kernels
        seconds = seconds.contiguous()
        offsets = offsets.int().contiguous()
        thresholds = thresholds.contiguous()
        row_blocks, time_buckets = plan_batch(
            seconds, offsets, thresholds, max_length, config.block_m, config.block_n, num_contextual, kernels
        )
        return cls(
            offsets,
            seconds,
            thresholds,
            row_blocks,
            time_buckets,
            num_contextual,
            max_length,
            config,
            kernels,
        )


@torch.library.custom_op("millrace::attention_plan", mutates_args=())
def plan_batch(
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    max_length: int,
    block_m: int,
    block_n: int,
    num_contextual: int,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """Return row_blocks and time_buckets, see AttentionPlan."""
    row_blocks, time_buckets = empty_plan(
        seconds, offsets, thresholds, max_length, block_m, block_n, num_contextual, kernels
    )
    if kernels:
        fill_row_blocks(row_blocks, offsets, max_length, block_m, block_n, num_contextual)
        fill_time_buckets(time_buckets, row_blocks, offsets, seconds, thresholds, max_length, block_m, block_n)
    return row_blocks, time_buckets


@plan_batch.register_fake
def empty_plan(
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    max_length: int,
    block_m: int,
    block_n: int,
    num_contextual: int,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """Return uninitialised row_blocks and time_buckets; their sizes follow from the inputs' sizes alone."""
    blocks = max_row_blocks(seconds.shape[0], offsets.shape[0] - 1, block_m) if kernels else 0
    tiles = max_tiles(blocks, max_length, block_m, block_n, num_contextual)
    return seconds.new_empty((blocks, 4)), seconds.new_empty(tiles * block_m * block_n, dtype=torch.uint8)
