"""Launches of the streaming top-k: what is sampled, which tiles, which buffers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import ceil_div, launch, next_power_of_2
from kernels.sequence_recommendation_interaction import kernel
from kernels.sequence_recommendation_interaction.tiles import Card, TopKTiles, tiles_for

CAPACITY = 8192  # candidates a user: 64 KiB, and what one program selects from in its registers
USERS_AT_ONCE = 256  # 16 MiB of candidates
MAX_GROUPS = 16384  # maxima that one program holds in its registers without spilling
FAST = torch.version.cuda is not None  # the inline code is NVIDIA's


@dataclass(frozen=True, slots=True)
class TopKPlan:
    """stride: one row of so many is sampled, 0 = none; group: sampled rows a maximum stands for; tiles: of the pass;
    sample: of the sample, if others."""

    stride: int
    group: int
    tiles: TopKTiles
    capacity: int = CAPACITY
    sample: TopKTiles | None = None


def plan(items: int, users: int, width: int, k: int, element_bytes: int, card: Card) -> TopKPlan:
    """Sample so that an eighth of the capacity is filled: half as many rows in the sample cost 0.018 ms less there
    and 0.045 ms more in the pass (1 M items, 256 users, H100). And so that k maxima come from many more groups."""
    tiles = tiles_for(users, width, element_bytes, card)
    if items <= CAPACITY:
        return TopKPlan(0, 0, tiles)
    stride = 1
    while 2 * stride * k <= CAPACITY // 8 and items // (2 * stride * 8) >= 4 * k:
        stride *= 2
    group = 8
    while group < min(64, tiles.items) and items // (stride * 2 * group) >= 8 * k:
        group *= 2
    while items // (stride * group) > MAX_GROUPS and 2 * stride * k <= CAPACITY // 2:
        stride *= 2
    sample = tiles.of_sample(group, next_power_of_2(width) * element_bytes, card.shared_bytes)
    return TopKPlan(stride, group, tiles, sample=sample)


@dataclass(frozen=True, slots=True)
class ItemRows:
    """table: [items, width]; scales: float32 [items] of an int8 table; eligible: bool [items]."""

    table: Tensor
    scales: Tensor | None
    eligible: Tensor | None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """An absent tensor's place is taken by the table: the kernel never reads it."""
        table = self.table
        return table, table if self.scales is None else self.scales, table if self.eligible is None else self.eligible

    @property
    def flags(self) -> dict[str, bool]:
        return {"QUANTISED": self.scales is not None, "MASKED": self.eligible is not None}


@dataclass(frozen=True, slots=True)
class Seen:
    """rows: int [n], ascending a user; offsets: int [users + 1]."""

    rows: Tensor
    offsets: Tensor


def top_k(
    states: Tensor, catalogue: ItemRows, k: int, seen: Seen | None, plan: TopKPlan, processors: int
) -> tuple[Tensor, Tensor]:
    """Launches on checked input of at least one user, one item and k = 1."""
    best = torch.empty(len(states), k, dtype=torch.float32, device=states.device)
    rows = torch.empty(len(states), k, dtype=torch.int64, device=states.device)
    for start in range(0, len(states), USERS_AT_ONCE):
        part = slice(start, start + USERS_AT_ONCE)
        listed = None if seen is None else Seen(seen.rows, seen.offsets[start : start + USERS_AT_ONCE + 1])
        _top_k(states[part], catalogue, k, listed, plan, processors, best[part], rows[part])
    return best, rows


def _top_k(
    states: Tensor, catalogue: ItemRows, k: int, seen: Seen | None, plan: TopKPlan, processors: int, best: Tensor,
    rows: Tensor,
) -> None:  # fmt: skip
    users, device = len(states), states.device
    # Two tensors: Triton compiles anew for an address that 16 does not divide.
    counts, failures = (torch.zeros(size, dtype=torch.int32, device=device) for size in (users, 1))
    failed = torch.empty(users, dtype=torch.int32, device=device)
    candidates = torch.empty(users, plan.capacity, dtype=torch.int64, device=device)
    bounds = _bounds(states, catalogue, k, seen, plan, processors)
    table, scales, eligible = catalogue.pointers
    listed, offsets = (failed, failed) if seen is None else (seen.rows, seen.offsets)
    shape, strides = {"WIDTH": table.shape[1], "CAPACITY": plan.capacity}, (states.stride(0), table.stride(0))
    block_k = max(16, next_power_of_2(k))
    launch(
        kernel.filter_kernel, _grid(plan.tiles, users, table.shape[0], processors),
        states, table, scales, eligible, bounds, counts, candidates, users, table.shape[0], *strides,
        **shape, **_blocks(plan.tiles, table.shape[1]), **catalogue.flags,
        FAST=states.is_cuda and FAST and plan.tiles.whole_packs,
    )  # fmt: skip
    selected = (bounds, counts, candidates, listed, offsets, failed, failures, best, rows, k)
    chosen = {"CAPACITY": plan.capacity, "BLOCK_K": block_k, "SEEN": seen is not None, "num_warps": 8}
    launch(kernel.select_kernel, (users,), *selected, RESCUED=False, **chosen)
    splits = plan.capacity // block_k
    launch(
        kernel.rescue_kernel, (splits * max(1, 4 * processors // splits),),
        states, table, scales, eligible, listed, offsets, counts, candidates, failed, failures, table.shape[0],
        *strides, splits, **shape, STEP=32, BLOCK_K=block_k, SEEN=seen is not None, **catalogue.flags,
    )  # fmt: skip
    launch(kernel.select_kernel, (users,), *selected, RESCUED=True, **chosen)


def _bounds(states: Tensor, catalogue: ItemRows, k: int, seen: Seen | None, plan: TopKPlan, processors: int) -> Tensor:
    users, (items, width) = len(states), catalogue.table.shape
    if plan.stride == 0:
        return torch.full((users,), kernel.NO_BOUND.value, dtype=torch.float32, device=states.device)
    bounds = torch.empty(users, dtype=torch.float32, device=states.device)
    groups = ceil_div(ceil_div(items, plan.stride), plan.group)
    maxima = torch.empty(users, groups, dtype=torch.float32, device=states.device)
    table, scales, eligible = catalogue.pointers
    tiles = plan.sample or plan.tiles
    launch(
        kernel.sample_kernel, _grid(tiles, users, groups * plan.group, processors),
        states, table, scales, eligible, maxima, users, items, groups, states.stride(0), table.stride(0),
        STRIDE=plan.stride, GROUP=plan.group, WIDTH=width, **_blocks(tiles, width), **catalogue.flags,
    )  # fmt: skip
    highest = plan.capacity * 3 // 4 // plan.stride
    launch(
        kernel.bound_kernel, (users,),
        maxima, maxima if seen is None else seen.offsets, bounds, groups, k, highest,
        STRIDE=plan.stride, BLOCK=next_power_of_2(groups), SEEN=seen is not None,
        num_warps=8 if groups <= MAX_GROUPS else 16,
    )  # fmt: skip
    return bounds


def _grid(tiles: TopKTiles, users: int, items: int, processors: int) -> tuple[int, int]:
    """Tiles of users are neighbours, so that they meet the same items in the cache."""
    user_tiles = ceil_div(users, tiles.users)
    return user_tiles, min(ceil_div(items, tiles.items), max(1, processors * tiles.programs // user_tiles))


def _blocks(tiles: TopKTiles, width: int) -> dict[str, int]:
    return {
        "BLOCK_WIDTH": max(16, next_power_of_2(width)),
        "BLOCK_ITEMS": tiles.items,
        "BLOCK_USERS": tiles.users,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def candidate_scores(states: Tensor, catalogue: ItemRows, rows: Tensor) -> Tensor:
    """float32 [users, candidates]; checked input, at least one of each."""
    users, candidates = rows.shape
    scores = torch.empty(users, candidates, dtype=torch.float32, device=states.device)
    table, scales, _ = catalogue.pointers
    launch(
        kernel.candidate_kernel, (users * ceil_div(candidates, 16),),
        states, table, scales, rows, scores, candidates, states.stride(0), table.stride(0),
        WIDTH=table.shape[1], STEP=64, BLOCK=16, QUANTISED=catalogue.scales is not None, num_warps=4,
    )  # fmt: skip
    return scores
