"""The public calls: check arguments, run Triton on a GPU and the specification elsewhere. For inference only."""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.sequence_recommendation_interaction import reference
from kernels.sequence_recommendation_interaction.tiles import TileLimits
from kernels.validation import FLOAT_DTYPES, INT_DTYPES, offset_faults, require, require_values

MAX_K = 512
MAX_ROW_BYTES = 2048  # of a state: 16 of them and 16 items fill two thirds of the smallest shared memory
MAX_ITEMS = 1 << 30


def sequence_recommendation_interaction(
    states: Tensor,
    table: Tensor,
    k: int,
    *,
    seen: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    eligible: Tensor | None = None,
    scales: Tensor | None = None,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the k best rows of `table` per state: scores float32 [users, k], rows int64 [users, k], best first.

    states: [users, width], float32, bfloat16 or float16. table: [items, width] of the same dtype, or int8 with `scales`
    float32 [items]; any row stride, contiguous elements within a row.
    seen: int [n], rows excluded per user, ascending within a user; seen_offsets: int [users + 1] splits them by user.
    eligible: bool [items], rows that may be returned to any user. Of equal scores the lower row comes first. If too few
    items remain, or scores are NaN, the results end with scores -inf and rows -1.
    `check_values` waits for the device to check the values of states, seen and seen_offsets; disable it in graph
    capture, or if the caller has checked them: then seen rows must be within the table, and NaN states get no items.
    Raises ValueError that names the argument. No sum is atomic: equal inputs give equal bits.
    """
    _check(states, table, scales)
    require(0 < k <= MAX_K, f"k = {k} for states, which", states, f"k from 1 to {MAX_K}")
    users = states.shape[0]
    items = table.shape[0]
    if eligible is not None:
        require(
            eligible.dtype == torch.bool and eligible.shape == (items,) and eligible.device == states.device,
            "eligible",
            eligible,
            f"bool [{items}] on {states.device}",
        )
    if (seen is None) != (seen_offsets is None):
        raise ValueError("seen and seen_offsets must both be given or both be None; one of them is None")
    if seen is not None and seen_offsets is not None:
        _check_seen(seen, seen_offsets, users, states.device)
    if check_values and not torch.compiler.is_compiling():
        _check_states(states)
        if seen is not None and seen_offsets is not None:
            _check_seen_values(seen, seen_offsets, items)
    return _top_k(states, table, k, seen, seen_offsets, eligible, scales)


def candidate_interaction(
    states: Tensor, table: Tensor, rows: Tensor, *, scales: Tensor | None = None, check_values: bool = True
) -> Tensor:
    """Return scores float32 [users, candidates] of each user's own rows.

    rows: int64 or int32 [users, candidates], -1 for none, which scores -inf. The other arguments are those of
    `sequence_recommendation_interaction`.
    """
    _check(states, table, scales)
    users = states.shape[0]
    require(
        rows.dtype in INT_DTYPES and rows.dim() == 2 and rows.shape[0] == users and rows.device == states.device,
        "rows",
        rows,
        f"int32 or int64 [{users}, candidates] on {states.device}",
    )
    if check_values and not torch.compiler.is_compiling():
        _check_states(states)
        outside = (rows < -1) | (rows >= table.shape[0])
        require_values("rows", rows, {f"must be from -1 to {table.shape[0] - 1}": outside.any()})
    return _candidates(states, table, rows, scales)


def _check(states: Tensor, table: Tensor, scales: Tensor | None) -> None:
    require(
        states.dtype in FLOAT_DTYPES
        and states.dim() == 2
        and 0 < states.shape[1] * states.element_size() <= MAX_ROW_BYTES,
        "states",
        states,
        f"float32, bfloat16 or float16 [users, 1 to {MAX_ROW_BYTES} bytes]",
    )
    dtype = states.dtype if scales is None else torch.int8
    width = states.shape[1]
    require(
        table.dtype == dtype and table.dim() == 2 and table.shape[1] == width and table.device == states.device,
        "table",
        table,
        f"{dtype} [items, {width}] on {states.device} (int8 with scales)",
    )
    require(table.shape[0] <= MAX_ITEMS, "table", table, f"at most {MAX_ITEMS} items")
    dense = table.numel() == 0 or width == 1 or table.stride(1) == 1
    require(dense, "table", table, "contiguous elements within a row")
    if scales is not None:
        require(
            scales.dtype == torch.float32 and scales.shape == (table.shape[0],) and scales.device == states.device,
            "scales",
            scales,
            f"torch.float32 [{table.shape[0]}] on {states.device}",
        )


def _check_seen(seen: Tensor, seen_offsets: Tensor, users: int, device: torch.device) -> None:
    require(
        seen.dtype in INT_DTYPES and seen.dim() == 1 and seen.device == device,
        "seen",
        seen,
        f"int32 or int64 [n] on {device}",
    )
    require(
        seen_offsets.dtype in INT_DTYPES and seen_offsets.shape == (users + 1,) and seen_offsets.device == device,
        "seen_offsets",
        seen_offsets,
        f"int32 or int64 [{users + 1}] on {device}",
    )


def _check_states(states: Tensor) -> None:
    require_values("states", states, {"must be finite": ~states.isfinite().all()})


def _check_seen_values(seen: Tensor, seen_offsets: Tensor, items: int) -> None:
    require_values("seen_offsets", seen_offsets, offset_faults(seen_offsets, seen.shape[0]))
    if seen.shape[0] == 0:
        return
    descents = seen.diff() < 0  # [n - 1]
    inner = seen_offsets[1:-1]
    user_starts = inner[(inner > 0) & (inner < seen.shape[0])].long()
    descents[user_starts - 1] = False
    faults = {
        f"must be from 0 to {items - 1}": ((seen < 0) | (seen >= items)).any(),
        "must ascend within a user": descents.any(),
    }
    require_values("seen", seen, faults)


@torch.library.custom_op("millrace::sequence_recommendation_interaction", mutates_args=())
def _top_k(
    states: Tensor,
    table: Tensor,
    k: int,
    seen: Tensor | None,
    seen_offsets: Tensor | None,
    eligible: Tensor | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not states.is_cuda or states.shape[0] == 0 or table.shape[0] == 0:
        return reference.sequence_recommendation_interaction(states, table, k, seen, seen_offsets, eligible, scales)
    from kernels.sequence_recommendation_interaction import launch

    num_sms, limits = _device_limits(states.device)
    states = states if states.stride(1) == 1 else states.contiguous()
    catalogue = launch.ItemRows(table, _contiguous(scales), _contiguous(eligible))
    seen_rows = None
    if seen is not None and seen_offsets is not None:
        seen_rows = launch.ExcludedRows(seen.contiguous(), seen_offsets.contiguous())
    plan = launch.make_plan(table.shape[0], states.shape[0], table.shape[1], k, states.element_size(), limits)
    return launch.top_k(states, catalogue, k, seen_rows, plan, num_sms)


@_top_k.register_fake
def _(
    states: Tensor,
    table: Tensor,
    k: int,
    seen: Tensor | None,
    seen_offsets: Tensor | None,
    eligible: Tensor | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (states.shape[0], k)
    return states.new_empty(shape, dtype=torch.float32), states.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("millrace::candidate_interaction", mutates_args=())
def _candidates(states: Tensor, table: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor:
    if table.shape[0] == 0:
        return states.new_full(rows.shape, -torch.inf, dtype=torch.float32)
    if not states.is_cuda or rows.numel() == 0:
        return reference.candidate_interaction(states, table, rows, scales)
    from kernels.sequence_recommendation_interaction import launch

    states = states if states.stride(1) == 1 else states.contiguous()
    return launch.candidate_scores(states, launch.ItemRows(table, _contiguous(scales), None), rows.contiguous())


@_candidates.register_fake
def _(states: Tensor, table: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor:
    return states.new_empty(rows.shape, dtype=torch.float32)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@lru_cache
def _device_limits(device: torch.device) -> tuple[int, TileLimits]:
    """Return the number of multiprocessors, and the limits on tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count, TileLimits.from_device(device)
