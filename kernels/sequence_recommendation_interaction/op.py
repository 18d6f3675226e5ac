"""The checked call: shapes at the door, Triton on a GPU, the specification elsewhere. For inference: no gradients."""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.sequence_recommendation_interaction import reference
from kernels.sequence_recommendation_interaction.tiles import Card
from kernels.validation import FLOATS, INTEGERS, offset_faults, require, require_values

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
    """The k best rows of `table` for every state: scores float32 [users, k], rows int64 [users, k], best first.

    states: [users, width], float32, bfloat16 or float16. table: [items, width] of the same dtype, or int8 with `scales`
    float32 [items]; rows may lie apart, a row's elements may not.
    seen: int [n], rows that a user must not get, ascending a user; seen_offsets: int [users + 1] cuts them.
    eligible: bool [items], rows that anyone may get. Equal scores: the lower row first. Where no item is left, or a
    score is no number, the answer ends in scores -inf and rows -1.
    `check_values` waits for the device to look at the values of states, seen and seen_offsets; leave it out in graph
    capture and where the caller has checked them: then seen rows must be within the table, NaN states get no items.
    Raises ValueError that names the argument. No sum is atomic: equal inputs give equal bits.
    """
    _check(states, table, scales)
    require(0 < k <= MAX_K, f"k = {k} for states, which", states, f"k from 1 to {MAX_K}")
    users, items = states.shape[0], table.shape[0]
    if eligible is not None:
        require(eligible.dtype == torch.bool and eligible.shape == (items,) and eligible.device == states.device,
                "eligible", eligible, f"bool [{items}] on {states.device}")  # fmt: skip
    if (seen is None) != (seen_offsets is None):
        raise ValueError("seen and seen_offsets come together, one of them is None")
    if seen is not None and seen_offsets is not None:
        require(seen.dtype in INTEGERS and seen.dim() == 1 and seen.device == states.device,
                "seen", seen, f"int32 or int64 [n] on {states.device}")  # fmt: skip
        require(seen_offsets.dtype in INTEGERS and seen_offsets.shape == (users + 1,) and
                seen_offsets.device == states.device,
                "seen_offsets", seen_offsets, f"int32 or int64 [{users + 1}] on {states.device}")  # fmt: skip
    if check_values and not torch.compiler.is_compiling():
        _check_states(states)
        if seen is not None and seen_offsets is not None:
            _check_seen(seen, seen_offsets, items)
    return _top_k(states, table, k, seen, seen_offsets, eligible, scales)


def candidate_interaction(
    states: Tensor, table: Tensor, rows: Tensor, *, scales: Tensor | None = None, check_values: bool = True
) -> Tensor:
    """Scores float32 [users, candidates] of each user's own rows: int64 or int32 [users, candidates], -1 for none.

    The other arguments are those of `sequence_recommendation_interaction`; a row of -1 has the score -inf.
    """
    _check(states, table, scales)
    users = states.shape[0]
    require(rows.dtype in INTEGERS and rows.dim() == 2 and rows.shape[0] == users and rows.device == states.device,
            "rows", rows, f"int32 or int64 [{users}, candidates] on {states.device}")  # fmt: skip
    if check_values and not torch.compiler.is_compiling():
        _check_states(states)
        outside = (rows < -1) | (rows >= table.shape[0])
        require_values("rows", rows, {f"must be from -1 to {table.shape[0] - 1}": outside.any()})
    return _candidates(states, table, rows, scales)


def _check(states: Tensor, table: Tensor, scales: Tensor | None) -> None:
    require(states.dtype in FLOATS and states.dim() == 2 and
            0 < states.shape[1] * states.element_size() <= MAX_ROW_BYTES,
            "states", states, f"float32, bfloat16 or float16 [users, 1 to {MAX_ROW_BYTES} bytes]")  # fmt: skip
    dtype, width = states.dtype if scales is None else torch.int8, states.shape[1]
    require(table.dtype == dtype and table.dim() == 2 and table.shape[1] == width and
            table.device == states.device,
            "table", table, f"{dtype} [items, {width}] on {states.device} (int8 with scales)")  # fmt: skip
    require(table.shape[0] <= MAX_ITEMS, "table", table, f"at most {MAX_ITEMS} items")
    dense = table.numel() == 0 or width == 1 or table.stride(1) == 1
    require(dense, "table", table, "elements of a row next to each other")
    if scales is not None:
        require(scales.dtype == torch.float32 and scales.shape == (table.shape[0],) and scales.device == states.device,
                "scales", scales, f"torch.float32 [{table.shape[0]}] on {states.device}")  # fmt: skip


def _check_states(states: Tensor) -> None:
    require_values("states", states, {"must be finite": ~states.isfinite().all()})


def _check_seen(seen: Tensor, seen_offsets: Tensor, items: int) -> None:
    require_values("seen_offsets", seen_offsets, offset_faults(seen_offsets, seen.shape[0]))
    if seen.shape[0] == 0:
        return
    descents = seen.diff() < 0  # [n - 1]
    descents[(seen_offsets[1:-1] - 1)[(seen_offsets[1:-1] > 0) & (seen_offsets[1:-1] < seen.shape[0])].long()] = False
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

    processors, card = _device(states.device)
    states = states if states.stride(1) == 1 else states.contiguous()
    catalogue = launch.ItemRows(table, _dense(scales), _dense(eligible))
    listed = None
    if seen is not None and seen_offsets is not None:
        listed = launch.Seen(seen.contiguous(), seen_offsets.contiguous())
    plan = launch.plan(table.shape[0], states.shape[0], table.shape[1], k, states.element_size(), card)
    return launch.top_k(states, catalogue, k, listed, plan, processors)


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
    return launch.candidate_scores(states, launch.ItemRows(table, _dense(scales), None), rows.contiguous())


@_candidates.register_fake
def _(states: Tensor, table: Tensor, rows: Tensor, scales: Tensor | None) -> Tensor:
    return states.new_empty(rows.shape, dtype=torch.float32)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


@lru_cache
def _device(device: torch.device) -> tuple[int, Card]:
    """Multiprocessors, and what the tiles depend on."""
    return torch.cuda.get_device_properties(device).multi_processor_count, Card.of(device)
