"""The gate and the product after attention in one launch against the same in two."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.gate_norm import normalise_and_gate
from kernels.fused_attention_layernorm.gate_projection import (
    LARGE,
    MAX_ROWS_MIDDLE,
    MAX_ROWS_TWO_LAUNCHES,
    MIDDLE,
    project_gated,
    select_tiles,
)
from kernels.fused_attention_layernorm.launch import SMALL, ProjectionTiles
from kernels.fused_attention_layernorm.projection import project_out
from tests.kernels.fused_attention_layernorm.test_op_reference import DEVICE

EPS = 1e-6


class Inputs(NamedTuple):
    """Arguments of `project_gated`, in its order."""

    attn_out: Tensor
    attn_row_stats: Tensor
    u: Tensor
    gain: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    x: Tensor


def make_inputs(*, rows: int, width: int, heads: int, columns: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(rows)
    attn_out, x = (torch.randn(rows, size, device=DEVICE).to(dtype) for size in (width, columns))
    u = torch.randn(rows, 4 * width, device=DEVICE).to(dtype)[:, :width]  # a slice of the product before attention
    parts = attn_out.float().unflatten(1, (heads, -1))
    row_stats = torch.stack([parts.sum(2), parts.square().sum(2)], 2).contiguous()
    gain, shift, bias = (torch.randn(size, device=DEVICE) for size in (width, width, columns))
    weight = (torch.randn(columns, width, device=DEVICE) / width**0.5).to(dtype)
    return Inputs(attn_out, row_stats, u, gain, shift, weight, bias, x)


@pytest.mark.parametrize("tiles", [LARGE, MIDDLE, SMALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "heads", "columns"), [(0, 32, 2, 32), (1, 16, 1, 16), (70, 48, 2, 40), (130, 64, 4, 128)]
)
def test_one_launch_equals_two_launches(
    dtype: torch.dtype, rows: int, width: int, heads: int, columns: int, tiles: ProjectionTiles
) -> None:
    inputs = make_inputs(rows=rows, width=width, heads=heads, columns=columns, dtype=dtype)
    small_enough = ProjectionTiles(
        tiles.block_m, min(tiles.block_n, 128), tiles.block_k, tiles.warps, min(2, tiles.stages)
    )
    result, row_stats = project_gated(*inputs, EPS, small_enough)
    y = normalise_and_gate(inputs.attn_out, inputs.attn_row_stats, inputs.u, inputs.gain, inputs.shift, EPS)
    expected, expected_stats = project_out(y, inputs.weight, inputs.bias, inputs.x)
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
    inputs = make_inputs(rows=rows, width=512, heads=4, columns=512, dtype=torch.bfloat16)
    assert select_tiles(inputs.attn_out, inputs.x) == tiles
    result = project_gated(*inputs, EPS)[0]
    attn_out = inputs.attn_out.float()
    y = F.layer_norm(attn_out, attn_out.shape[1:], inputs.gain, inputs.shift, EPS) * inputs.u.float()
    expected = inputs.x.float() + F.linear(y, inputs.weight.float(), inputs.bias)
    assert (result - expected).norm() <= 2**-8 * expected.norm()
