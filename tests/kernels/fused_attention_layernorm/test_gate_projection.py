"""The gate and the product after attention in one launch give what they give in two."""

import pytest
import torch

from kernels.fused_attention_layernorm.gate_projection import LARGE, MAX_ROWS_TWO_LAUNCHES, MIDDLE, MAX_ROWS_MIDDLE, select_tiles
from kernels.fused_attention_layernorm.projection import SMALL, ProjectionTiles
from tests.benchmarks.kernels_gated import Inputs
from tests.kernels.fused_attention_layernorm.test_op_reference import DEVICE


@pytest.mark.parametrize("tiles", [LARGE, MIDDLE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "heads", "columns"), [(0, 32, 2, 32), (1, 16, 1, 16), (70, 48, 2, 40), (130, 64, 4, 128)]
)
def test_one_launch_gives_what_two_give(dtype, rows, width, heads, columns, tiles):
    given = Inputs.of(rows, width, heads, columns, dtype, DEVICE)
    fitting = ProjectionTiles(tiles.rows, min(tiles.columns, 128), tiles.depth, tiles.warps, min(2, tiles.stages))
    (wanted, wanted_moments), (found, moments) = given.in_two(), given.in_one(fitting)
    bound = 2**-9 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound * 4)
    torch.testing.assert_close(moments.sum(1), wanted_moments.sum(1), rtol=bound, atol=bound * columns)


def test_where_it_was_not_measured_there_are_two_launches():
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.zeros(MAX_ROWS_MIDDLE + 1, LARGE.block_n, dtype=dtype)
        assert select_tiles(rows, rows) is None  # a CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("rows", "tiles"), [(MAX_ROWS_TWO_LAUNCHES, None), (MAX_ROWS_TWO_LAUNCHES + 1, MIDDLE), (MAX_ROWS_MIDDLE + 7, LARGE)])
def test_on_a_hopper_gpu_many_rows_take_one_launch(rows, tiles):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not measured on this card")
    given = Inputs.of(rows, 512, 4, 512, torch.bfloat16, DEVICE)
    assert select_tiles(given.attended, given.x) == tiles
    found, wanted = given.in_one()[0], given.specified()
    assert (found - wanted).norm() <= 2**-8 * wanted.norm()
