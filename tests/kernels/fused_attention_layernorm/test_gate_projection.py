"""The gate and the product after attention in one launch against the same in two."""

import pytest
import torch

from kernels.fused_attention_layernorm.gate_projection import (
    LARGE,
    MAX_ROWS_MIDDLE,
    MAX_ROWS_TWO_LAUNCHES,
    MIDDLE,
    select_tiles,
)
from kernels.fused_attention_layernorm.launch import SMALL, ProjectionTiles
from tests.benchmarks.kernels_gated import Inputs
from tests.kernels.fused_attention_layernorm.test_op_reference import DEVICE


@pytest.mark.parametrize("tiles", [LARGE, MIDDLE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "heads", "columns"), [(0, 32, 2, 32), (1, 16, 1, 16), (70, 48, 2, 40), (130, 64, 4, 128)]
)
def test_one_launch_equals_two_launches(
    dtype: torch.dtype, rows: int, width: int, heads: int, columns: int, tiles: ProjectionTiles
) -> None:
    inputs = Inputs.of(rows, width, heads, columns, dtype, DEVICE)
    small_enough = ProjectionTiles(
        tiles.block_m, min(tiles.block_n, 128), tiles.block_k, tiles.warps, min(2, tiles.stages)
    )
    expected, expected_stats = inputs.in_two()
    result, row_stats = inputs.in_one(small_enough)
    bound = 2**-9 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(result, expected, rtol=bound, atol=bound * 4)
    torch.testing.assert_close(row_stats.sum(1), expected_stats.sum(1), rtol=bound, atol=bound * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_that_was_not_measured_uses_two_launches(dtype: torch.dtype) -> None:
    rows = torch.zeros(MAX_ROWS_MIDDLE + 1, LARGE.block_n, dtype=dtype)  # on a CPU
    assert select_tiles(rows, rows) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("rows", "tiles"),
    [(MAX_ROWS_TWO_LAUNCHES, None), (MAX_ROWS_TWO_LAUNCHES + 1, MIDDLE), (MAX_ROWS_MIDDLE + 7, LARGE)],
)
def test_on_hopper_many_rows_use_one_launch(rows: int, tiles: ProjectionTiles | None) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not measured on this GPU")
    inputs = Inputs.of(rows, 512, 4, 512, torch.bfloat16, DEVICE)
    assert select_tiles(inputs.attended, inputs.x) == tiles
    result = inputs.in_one()[0]
    expected = inputs.specified()
    assert (result - expected).norm() <= 2**-8 * expected.norm()
