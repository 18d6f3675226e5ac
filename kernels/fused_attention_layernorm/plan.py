"""A packed batch as attention wants it: checked once, its row blocks and time buckets made once for all layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm import validation
from kernels.fused_attention_layernorm.launch import KernelConfig, kernel_config_for
from kernels.fused_attention_layernorm.plan_kernels import block_bound, fill_buckets, plan_items, tile_bound


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """offsets: int32 [users + 1]; seconds: int32 [total]; thresholds: int32 [times - 1]; targets: int32 [users] or None
    items: int32 [blocks, 4], see plan_kernel; buckets: uint8 [tiles * rows * columns] of `launch`; both empty without
    `kernels`: then the reference runs.
    """

    offsets: Tensor
    seconds: Tensor
    thresholds: Tensor
    targets: Tensor | None
    items: Tensor
    buckets: Tensor
    contextual: int
    max_length: int
    launch: KernelConfig
    kernels: bool

    @classmethod
    def from_batch(
        cls,
        seconds: Tensor,
        offsets: Tensor,
        thresholds: Tensor,
        max_length: int,
        dtype: torch.dtype,
        targets: Tensor | None = None,
        contextual: int = 0,
        *,
        launch: KernelConfig | None = None,
        kernels: bool | None = None,
        trusted: bool = False,
    ) -> "AttentionPlan":
        """The plan of users whose rows follow each other.

        seconds: int32 [total], times of the events, ascending within a user, less than 2^31 s apart; offsets: int32 or
        int64 [users + 1]; thresholds: int32 [times - 1], ascending, at most 255; max_length: no user is longer; dtype:
        of q, k, v.
        targets: int32 [users], that many last rows are candidates that no other row sees; contextual: that many first
        rows describe the user and see all rows but the targets.
        launch: instead of the table's choice. kernels: instead of 'on a GPU'; on a CPU they need Triton's interpreter.
        trusted: leave the values unchecked, and do not wait for the device: for CUDA graphs and torch.compile. Rows
        beyond a longer user's `max_length` then stay unwritten.

        Raises ValueError that names the argument, its shape, and what was expected.
        """
        validation.check_plan(dtype, max_length, contextual)
        validation.check_batch(seconds, offsets, thresholds, targets)
        if not trusted:
            validation.check_values(seconds, offsets, thresholds, targets, max_length)
        launch = launch or kernel_config_for(seconds.device, dtype, max_length)
        kernels = seconds.is_cuda if kernels is None else kernels
        seconds, offsets, thresholds = seconds.contiguous(), offsets.int().contiguous(), thresholds.contiguous()
        targets, tile = None if targets is None else targets.contiguous(), (launch.rows, launch.columns)
        items, buckets = plan_batch(seconds, offsets, thresholds, max_length, *tile, contextual, kernels)
        return cls(offsets, seconds, thresholds, targets, items, buckets, contextual, max_length, launch, kernels)


@torch.library.custom_op("millrace::attention_plan", mutates_args=())
def plan_batch(
    seconds: Tensor, offsets: Tensor, thresholds: Tensor, max_length: int, rows: int, columns: int, contextual: int,
    kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> items and buckets, see Plan."""
    items, buckets = empty_plan(seconds, offsets, thresholds, max_length, rows, columns, contextual, kernels)
    if kernels:
        plan_items(items, offsets, max_length, rows, columns, contextual)
        fill_buckets(buckets, items, offsets, seconds, thresholds, max_length, rows, columns)
    return items, buckets


@plan_batch.register_fake
def empty_plan(
    seconds: Tensor, offsets: Tensor, thresholds: Tensor, max_length: int, rows: int, columns: int, contextual: int,
    kernels: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of the right sizes, which follow from the inputs' sizes alone."""
    blocks = block_bound(seconds.shape[0], offsets.shape[0] - 1, rows) if kernels else 0
    tiles = tile_bound(blocks, max_length, rows, columns, contextual)
    return seconds.new_empty((blocks, 4)), seconds.new_empty(tiles * rows * columns, dtype=torch.uint8)
