"""Launches of the streaming top-k: sampling, tiles and buffers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import ceil_div, is_nvidia, launch, next_power_of_2
from kernels.sequence_recommendation_interaction import kernel
from kernels.sequence_recommendation_interaction.tiles import TileLimits, TopKTiles, tiles_for

CANDIDATES_PER_USER = 8192  # 64 KiB, and what one program selects from in its registers
USERS_PER_PASS = 256  # 16 MiB of candidates
MAX_GROUPS = 16384  # maxima that one program holds in its registers without spilling
CANDIDATE_BLOCK = 16  # candidates per program of candidate_kernel


@dataclass(frozen=True, slots=True)
class TopKPlan:
    """Sample and tiles of one call.

    sample_stride: rows per sampled row, 0 without a sample; group_size: sampled rows per maximum; tiles: of the pass;
    sample_tiles: of the sample, if different.
    """

    sample_stride: int
    group_size: int
    tiles: TopKTiles
    capacity: int = CANDIDATES_PER_USER
    sample_tiles: TopKTiles | None = None


def make_plan(items: int, users: int, width: int, k: int, element_bytes: int, limits: TileLimits) -> TopKPlan:
    """Plan a sample whose bound fills an eighth of the capacity and whose k maxima come from many more groups.

    Half as many rows in the sample cost 0.018 ms less there and 0.045 ms more in the pass (1 M items, 256 users, H100).
    """
    tiles = tiles_for(users, width, element_bytes, limits)
    if items <= CANDIDATES_PER_USER:
        return TopKPlan(0, 0, tiles)
    stride = 1
    while 2 * stride * k <= CANDIDATES_PER_USER // 8 and items // (2 * stride * 8) >= 4 * k:
        stride *= 2
    group_size = 8
    while group_size < min(64, tiles.block_items) and items // (stride * 2 * group_size) >= 8 * k:
        group_size *= 2
    while items // (stride * group_size) > MAX_GROUPS and 2 * stride * k <= CANDIDATES_PER_USER // 2:
        stride *= 2
    sample_tiles = tiles.for_sample(group_size, next_power_of_2(width) * element_bytes, limits.shared_bytes)
    return TopKPlan(stride, group_size, tiles, sample_tiles=sample_tiles)


@dataclass(frozen=True, slots=True)
class ItemRows:
    """The catalogue. table: [items, width]; scales: float32 [items] of an int8 table; eligible: bool [items]."""

    table: Tensor
    scales: Tensor | None
    eligible: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return table, scales and eligible; the table replaces an absent one, which the kernel never reads."""
        table = self.table
        return table, table if self.scales is None else self.scales, table if self.eligible is None else self.eligible

    @property
    def flags(self) -> dict[str, bool]:
        """The kernels' constants that say which of the optional tensors are present."""
        return {"QUANTISED": self.scales is not None, "HAS_ELIGIBLE": self.eligible is not None}


@dataclass(frozen=True, slots=True)
class ExcludedRows:
    """Rows to exclude. rows: int [n], ascending within a user; offsets: int [users + 1]."""

    rows: Tensor
    offsets: Tensor


def top_k(
    states: Tensor, catalogue: ItemRows, k: int, seen: ExcludedRows | None, plan: TopKPlan, num_sms: int
) -> tuple[Tensor, Tensor]:
    """Launch the kernels on checked input of at least one user, one item and k = 1."""
    best = torch.empty(len(states), k, dtype=torch.float32, device=states.device)
    rows = torch.empty(len(states), k, dtype=torch.int64, device=states.device)
    for start in range(0, len(states), USERS_PER_PASS):
        users = slice(start, start + USERS_PER_PASS)
        users_seen = None if seen is None else ExcludedRows(seen.rows, seen.offsets[start : start + USERS_PER_PASS + 1])
        _top_k(states[users], catalogue, k, users_seen, plan, num_sms, best[users], rows[users])
    return best, rows


def _top_k(
    states: Tensor,
    catalogue: ItemRows,
    k: int,
    seen: ExcludedRows | None,
    plan: TopKPlan,
    num_sms: int,
    best: Tensor,
    rows: Tensor,
) -> None:
    users = len(states)
    device = states.device
    # Two tensors: Triton compiles another variant for an address that is not a multiple of 16.
    counts = torch.zeros(users, dtype=torch.int32, device=device)
    overflow_count = torch.zeros(1, dtype=torch.int32, device=device)
    overflow_users = torch.empty(users, dtype=torch.int32, device=device)
    candidates = torch.empty(users, plan.capacity, dtype=torch.int64, device=device)
    bounds = _bounds(states, catalogue, k, seen, plan, num_sms)
    table, scales, eligible = catalogue.pointers
    items, width = table.shape
    seen_rows, seen_offsets = (overflow_users, overflow_users) if seen is None else (seen.rows, seen.offsets)
    sizes = {"D_MODEL": width, "CAPACITY": plan.capacity}
    strides = (states.stride(0), table.stride(0))
    block_k = max(16, next_power_of_2(k))
    launch(
        kernel.filter_kernel, _grid(plan.tiles, users, items, num_sms),
        states, table, scales, eligible, bounds, counts, candidates, users, items, *strides,
        **sizes, **_tile_options(plan.tiles, width), **catalogue.flags,
        USE_PTX=is_nvidia(states.device) and plan.tiles.fills_packs,
    )  # fmt: skip
    arguments = (
        bounds, counts, candidates, seen_rows, seen_offsets, overflow_users, overflow_count, best, rows, k,
    )  # fmt: skip
    options = {"CAPACITY": plan.capacity, "BLOCK_K": block_k, "HAS_SEEN": seen is not None, "num_warps": 8}
    launch(kernel.select_kernel, (users,), *arguments, OVERFLOW=False, **options)
    splits = plan.capacity // block_k
    launch(
        kernel.overflow_kernel, (splits * max(1, 4 * num_sms // splits),),
        states, table, scales, eligible, seen_rows, seen_offsets, counts, candidates, overflow_users, overflow_count,
        items, *strides, splits, **sizes, BLOCK_D=32, BLOCK_K=block_k, HAS_SEEN=seen is not None, **catalogue.flags,
    )  # fmt: skip
    launch(kernel.select_kernel, (users,), *arguments, OVERFLOW=True, **options)


def _bounds(
    states: Tensor, catalogue: ItemRows, k: int, seen: ExcludedRows | None, plan: TopKPlan, num_sms: int
) -> Tensor:
    users = len(states)
    items, width = catalogue.table.shape
    if plan.sample_stride == 0:
        return torch.full((users,), kernel.NO_BOUND.value, dtype=torch.float32, device=states.device)
    bounds = torch.empty(users, dtype=torch.float32, device=states.device)
    groups = ceil_div(ceil_div(items, plan.sample_stride), plan.group_size)
    maxima = torch.empty(users, groups, dtype=torch.float32, device=states.device)
    table, scales, eligible = catalogue.pointers
    tiles = plan.sample_tiles or plan.tiles
    launch(
        kernel.sample_kernel, _grid(tiles, users, groups * plan.group_size, num_sms),
        states, table, scales, eligible, maxima, users, items, groups, states.stride(0), table.stride(0),
        SAMPLE_STRIDE=plan.sample_stride, GROUP_SIZE=plan.group_size, D_MODEL=width, **_tile_options(tiles, width),
        **catalogue.flags,
    )  # fmt: skip
    max_rank = plan.capacity * 3 // 4 // plan.sample_stride
    launch(
        kernel.bound_kernel, (users,),
        maxima, maxima if seen is None else seen.offsets, bounds, groups, k, max_rank,
        SAMPLE_STRIDE=plan.sample_stride, BLOCK=next_power_of_2(groups), HAS_SEEN=seen is not None,
        num_warps=8 if groups <= MAX_GROUPS else 16,
    )  # fmt: skip
    return bounds


def _grid(tiles: TopKTiles, users: int, items: int, num_sms: int) -> tuple[int, int]:
    """Return (tiles of users, tiles of items); programs of the same items are adjacent and share them in the cache."""
    user_tiles = ceil_div(users, tiles.block_users)
    max_item_tiles = max(1, num_sms * tiles.programs_per_sm // user_tiles)
    return user_tiles, min(ceil_div(items, tiles.block_items), max_item_tiles)


def _tile_options(tiles: TopKTiles, width: int) -> dict[str, int]:
    return {
        "BLOCK_D": max(16, next_power_of_2(width)),
        "BLOCK_ITEMS": tiles.block_items,
        "BLOCK_USERS": tiles.block_users,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def candidate_scores(states: Tensor, catalogue: ItemRows, rows: Tensor) -> Tensor:
    """Return scores float32 [users, candidates] of checked input, at least one of each."""
    users, candidates = rows.shape
    scores = torch.empty(users, candidates, dtype=torch.float32, device=states.device)
    table, scales, _ = catalogue.pointers
    launch(
        kernel.candidate_kernel, (users * ceil_div(candidates, CANDIDATE_BLOCK),),
        states, table, scales, rows, scores, candidates, states.stride(0), table.stride(0),
        D_MODEL=table.shape[1], BLOCK_D=64, BLOCK=CANDIDATE_BLOCK, QUANTISED=catalogue.scales is not None, num_warps=4,
    )  # fmt: skip
    return scores
