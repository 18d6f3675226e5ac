"""Tiles of the pass over the catalogue: a table of measured ones, and for all else what shared memory allows."""

from dataclasses import dataclass, replace

import torch

from kernels.launch import next_power_of_2, shared_bytes_of

PACK = 8  # scores of a thread that the inline code (append.py) takes at a time
SPARE_BYTES = 3072  # of shared memory, for what the compiler adds


@dataclass(frozen=True, slots=True)
class TopKTiles:
    """Items x users of a step, its warps, its load stages, programs an SM."""

    items: int
    users: int
    warps: int
    stages: int
    programs: int = 1

    @property
    def whole_packs(self) -> bool:
        """Whether the inline code gets its PACK scores from every thread; it must not append what pads them."""
        return self.items * self.users % (32 * self.warps * PACK) == 0

    def shared_bytes(self, row_bytes: int, group: int = 0) -> int:
        """What a program takes: its users' states, and items in every stage. group: scores of which it writes the
        greatest, by way of shared memory."""
        maxima = 4 * self.users * self.items // group if group else 0
        return (self.users + self.stages * self.items) * row_bytes + max(SPARE_BYTES, maxima)

    def of_sample(self, group: int, row_bytes: int, shared_bytes: int) -> "TopKTiles":
        """With stages, then items, fewer by what the maxima take."""
        tiles = self
        while tiles.shared_bytes(row_bytes, group) > shared_bytes and tiles.items > group:
            fewer = {"stages": tiles.stages - 1} if tiles.stages > 1 else {"items": tiles.items // 2}
            tiles = replace(tiles, **fewer)
        return tiles


@dataclass(frozen=True, slots=True)
class Card:
    """What the tiles depend on: capability as (major, minor), the shared memory that one program may take."""

    capability: tuple[int, int]
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> "Card":
        return cls(torch.cuda.get_device_capability(device), shared_bytes_of(device))


# (capability, bytes of an element, columns, users at once from ... on). Hopper's are measured, by
# `python -m tests.benchmarks.kernels_retrieval --tune`; those of Ampere and Ada are what `fitting_tiles` says, compiled
# for them (128 and 64 KiB of shared memory) and not run.
MANY = 129
TILES = {
    ((9, 0), 2, 256, True): TopKTiles(64, 256, 16, 3),  # a million items in 0.27 ms (H100); others: docs/kernels.md
    ((8, 0), 2, 256, True): TopKTiles(64, 128, 8, 3),
    ((8, 6), 2, 256, True): TopKTiles(64, 64, 4, 2),
    ((8, 9), 2, 256, True): TopKTiles(64, 64, 4, 2),
}


def tiles_for(users: int, width: int, element_bytes: int, card: Card) -> TopKTiles:
    columns = next_power_of_2(width)
    tabled = TILES.get((card.capability, element_bytes, columns, users >= MANY))
    if tabled and tabled.shared_bytes(columns * element_bytes) <= card.shared_bytes:
        return tabled
    return fitting_tiles(users, columns * element_bytes, card.shared_bytes)


def fitting_tiles(users: int, row_bytes: int, shared_bytes: int) -> TopKTiles:
    """States stay in shared memory for the whole pass, in four sevenths of it; items stream through the rest."""
    block_users = min(256, max(16, next_power_of_2(users)))
    while block_users > 16 and block_users * row_bytes > shared_bytes * 4 // 7:
        block_users //= 2
    block_items = 64
    while block_items > 16 and (block_users + block_items) * row_bytes > shared_bytes:
        block_items //= 2
    stages = max(1, min(3, ((shared_bytes - SPARE_BYTES) // row_bytes - block_users) // block_items))
    programs = max(1, min(4, shared_bytes // ((block_users + stages * block_items) * row_bytes + SPARE_BYTES)))
    return TopKTiles(block_items, block_users, max(4, block_users // 16), stages, programs)
