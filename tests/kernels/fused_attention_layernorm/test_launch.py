"""Tiles of attention and its projections: those of the tables fit their GPUs, and any other GPU gets tiles that fit."""

from itertools import product
from typing import Any

import pytest
import torch

from kernels.fused_attention_layernorm import projection
from kernels.fused_attention_layernorm.launch import (
    AMPERE,
    HOPPER,
    KERNEL_CONFIGS,
    LARGE_IN,
    LARGE_OUT,
    LOW_MEMORY,
    SAFE_CONFIG,
    SMALL,
    SMALL_ROWS,
    KernelConfig,
    ProjectionTiles,
    projection_tiles_for,
    shared_memory_bytes,
)
from kernels.launch import SHARED_BYTES

SMALLEST = min(SHARED_BYTES.values())


@pytest.mark.parametrize(("key", "config"), KERNEL_CONFIGS.items(), ids=str)
def test_attention_configs_fit_every_gpu_of_their_generation(key: tuple[int, int, bool], config: KernelConfig) -> None:
    major, element_bytes, _ = key
    for (generation, _), available in SHARED_BYTES.items():
        assert generation != major or shared_memory_bytes(config, 128, element_bytes) <= available


def test_attention_has_configs_for_hopper_and_ampere_and_one_for_any_gpu() -> None:
    assert {(major, 2, short) for major in (HOPPER, AMPERE) for short in (False, True)} <= set(KERNEL_CONFIGS)
    assert shared_memory_bytes(SAFE_CONFIG, 128, 4) <= SMALLEST
    assert shared_memory_bytes(SAFE_CONFIG, 256, 2) <= SMALLEST


@pytest.mark.parametrize("available", sorted(set(SHARED_BYTES.values())))
@pytest.mark.parametrize("large", [LARGE_IN, LARGE_OUT])
@pytest.mark.parametrize("rows", [1, SMALL_ROWS + 1])
def test_projections_use_the_measured_tiles_where_they_fit(rows: int, large: ProjectionTiles, available: int) -> None:
    for width, element_bytes in product((16, 512, 4096), (2, 4)):
        tiles = projection_tiles_for(rows, large, element_bytes, available)
        if element_bytes == 2 and available in (SHARED_BYTES[8, 0], SHARED_BYTES[9, 0]):
            assert tiles == (large if rows > SMALL_ROWS else SMALL)
        else:
            assert tiles.shrink_to(width, width).shared_bytes(element_bytes) <= available


def test_gpu_with_little_shared_memory_projects_with_low_memory_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, Any]] = []
    x = torch.zeros(SMALL_ROWS + 1, 256)
    monkeypatch.setattr(projection, "launch", lambda kernel, grid, *arguments, **options: launched.append(options))
    monkeypatch.setattr(projection, "max_shared_bytes", lambda device: SMALLEST)
    weight = torch.zeros(256, 256)
    bias = torch.zeros(256)
    row_stats = projection.project_out(x, weight, bias, x)[1]
    projection.project_in(x, row_stats, weight, bias, bias, 1e-6)
    assert len(launched) == 2
    assert all(LOW_MEMORY.kernel_options.items() <= options.items() for options in launched)
