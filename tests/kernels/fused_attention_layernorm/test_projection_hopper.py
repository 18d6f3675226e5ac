"""The product before attention in CuTe DSL against float32, and the choice between it and the Triton kernel."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.launch import SMALL_ROWS
from kernels.fused_attention_layernorm.projection import import_projection_hopper, project_in
from tests.kernels.fused_attention_layernorm.test_op import relative_error

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HAS_CUTE = find_spec("cutlass") is not None
EPS = 1e-5


def make_inputs(rows: int, columns: int, parts: int, width: int = 512) -> tuple[Tensor, ...]:
    """x [rows, width], row_stats [rows, parts, 2], weight [columns, width], its row sums, bias; on a GPU if any."""
    torch.manual_seed(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(rows, width, device=device) * 2 + 0.5).bfloat16()
    weight = (torch.randn(columns, width, device=device) * width**-0.5).bfloat16()
    split = x.float().unflatten(1, (parts, -1))
    row_stats = torch.stack([split.sum(2), split.square().sum(2)], 2)
    return x, row_stats, weight, weight.float().sum(1), torch.randn(columns, device=device)


def reference(x: Tensor, _: Tensor, weight: Tensor, __: Tensor, bias: Tensor) -> Tensor:
    normed = F.layer_norm(x.float(), (x.shape[1],), eps=EPS)
    return F.silu(F.linear(normed, weight.float(), bias))


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_HOPPER and HAS_CUTE), reason="no Hopper GPU with CuTe DSL")
@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(1, 2048, 1), (63, 1024, 2), (64, 2048, 4), (65, 512, 1), (5_000, 2048, 2), (20_001, 1024, 2), (74_108, 2048, 2)],
)
def test_on_hopper_any_number_of_rows_equals_the_specification(rows: int, columns: int, parts: int) -> None:
    from kernels.fused_attention_layernorm import projection_hopper

    inputs = make_inputs(rows, columns, parts)
    assert projection_hopper.fits(inputs[0], inputs[2])
    # Memory that `out` is likely to reuse.
    torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").fill_(float("nan"))
    result, again = (projection_hopper.project_in(*inputs, EPS) for _ in range(2))
    assert relative_error(result, reference(*inputs)) < 3e-3
    assert torch.equal(result, again)


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_HOPPER and HAS_CUTE), reason="no Hopper GPU with CuTe DSL")
def test_on_hopper_captured_graph_projects_new_rows() -> None:
    x, *rest = make_inputs(SMALL_ROWS + 1, 2048, 2)
    project_in(x, *rest, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = project_in(x, *rest, EPS)
    new_x, new_row_stats, *_ = make_inputs(SMALL_ROWS + 1, 2048, 2)
    x.copy_(new_x.flip(0))
    rest[0].copy_(new_row_stats.flip(0))
    graph.replay()
    assert relative_error(out, reference(x, *rest)) < 3e-3
    assert torch.equal(out, project_in(x, *rest, EPS))


def test_triton_kernel_equals_the_specification() -> None:
    inputs = tuple(part.float() for part in make_inputs(70, 128, 1, width=64))
    assert relative_error(project_in(*inputs, EPS), reference(*inputs)) < 5e-3


def test_device_other_than_hopper_has_no_cute_kernel() -> None:
    assert import_projection_hopper(torch.device("cpu")) is None
