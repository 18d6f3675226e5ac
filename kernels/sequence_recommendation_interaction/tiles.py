"""Tiles of the pass over the catalogue: a table of measured ones; otherwise what shared memory allows."""

from dataclasses import dataclass, replace

import torch

from kernels.launch import compute_capability, max_shared_bytes, next_power_of_2

PACK = 8  # scores of a thread that the inline code (compaction.py) handles at a time
SPARE_BYTES = 3072  # shared memory that the compiler adds


@dataclass(frozen=True, slots=True)
class TopKTiles:
    """block_items x block_users scores per step, warps and load stages of a program, programs per multiprocessor."""

    block_items: int
    block_users: int
    warps: int
    stages: int
    programs_per_sm: int = 1

    @property
    def fills_packs(self) -> bool:
        """Whether every thread holds a multiple of PACK scores; the inline code must not append padding."""
        return self.block_items * self.block_users % (32 * self.warps * PACK) == 0

    def shared_bytes(self, row_bytes: int, group_size: int = 0) -> int:
        """Return the bytes per program: its users' states, and items in every stage.

        group_size: scores per maximum, which is written by way of shared memory; 0 without maxima.
        """
        maxima = 4 * self.block_users * self.block_items // group_size if group_size else 0
        return (self.block_users + self.stages * self.block_items) * row_bytes + max(SPARE_BYTES, maxima)

    def for_sample(self, group_size: int, row_bytes: int, shared_bytes: int) -> "TopKTiles":
        """Reduce stages, then items, until the maxima fit too."""
        tiles = self
        while tiles.shared_bytes(row_bytes, group_size) > shared_bytes and tiles.block_items > group_size:
            smaller = {"stages": tiles.stages - 1} if tiles.stages > 1 else {"block_items": tiles.block_items // 2}
            tiles = replace(tiles, **smaller)
        return tiles


@dataclass(frozen=True, slots=True)
class TileLimits:
    """A GPU's limits on tiles: compute capability (major, minor), and shared memory per program."""

    capability: tuple[int, int]
    shared_bytes: int

    @classmethod
    def from_device(cls, device: torch.device) -> "TileLimits":
        return cls(compute_capability(device), max_shared_bytes(device))


# (capability, bytes per element, columns, large batch). Hopper's are measured, by
# `python -m tests.benchmarks.kernels_retrieval --tune`; those of Ampere and Ada are what `fitting_tiles` returns,
# compiled for them (128 and 64 KiB of shared memory) and not run.
LARGE_BATCH_USERS = 129  # users of a large batch, at least
TILES = {
    ((9, 0), 2, 256, True): TopKTiles(64, 256, 16, 3),  # a million items in 0.27 ms (H100); others: docs/kernels.md
    ((8, 0), 2, 256, True): TopKTiles(64, 128, 8, 3),
    ((8, 6), 2, 256, True): TopKTiles(64, 64, 4, 2),
    ((8, 9), 2, 256, True): TopKTiles(64, 64, 4, 2),
}


def tiles_for(users: int, width: int, element_bytes: int, limits: TileLimits) -> TopKTiles:
    """Return the table's tiles if they fit the limits, else `fitting_tiles`."""
    columns = next_power_of_2(width)
    tabled = TILES.get((limits.capability, element_bytes, columns, users >= LARGE_BATCH_USERS))
    if tabled and tabled.shared_bytes(columns * element_bytes) <= limits.shared_bytes:
        return tabled
    return fitting_tiles(users, columns * element_bytes, limits.shared_bytes)


def fitting_tiles(users: int, row_bytes: int, shared_bytes: int) -> TopKTiles:
    """Derive tiles: states take at most four sevenths of shared memory for the entire pass, items the rest."""
    block_users = min(256, max(16, next_power_of_2(users)))
    while block_users > 16 and block_users * row_bytes > shared_bytes * 4 // 7:
        block_users //= 2
    block_items = 64
    while block_items > 16 and (block_users + block_items) * row_bytes > shared_bytes:
        block_items //= 2
    stages = max(1, min(3, ((shared_bytes - SPARE_BYTES) // row_bytes - block_users) // block_items))
    programs = max(1, min(4, shared_bytes // ((block_users + stages * block_items) * row_bytes + SPARE_BYTES)))
    return TopKTiles(block_items, block_users, max(4, block_users // 16), stages, programs)
