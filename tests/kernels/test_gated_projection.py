"""The one launch of tests.benchmarks.kernels_gated gives what the two in use give."""

import pytest
import torch

from tests.benchmarks.kernels_gated import EPS, gated_projection, inputs_of, two_launches
from tests.kernels.test_fused_attention_layernorm import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "heads", "columns"), [(1, 16, 1, 16), (70, 48, 2, 40), (130, 64, 4, 128)])
def test_one_launch_gives_what_two_give(dtype: torch.dtype, rows: int, width: int, heads: int, columns: int) -> None:
    torch.manual_seed(rows)
    given = inputs_of(rows, width, heads, columns, dtype, DEVICE.type)
    (wanted, wanted_moments), (found, moments) = two_launches(*given, EPS), gated_projection(*given, EPS)
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
    torch.testing.assert_close(moments.sum(1), wanted_moments.sum(1), rtol=bound, atol=bound * columns)
