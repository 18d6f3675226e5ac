"""The product before attention in CuTe DSL against float32, and the choice between it and the Triton kernel."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.projection import SMALL_ROWS, import_projection_hopper, project_in

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HAS_CUTE = find_spec("cutlass") is not None
EPS = 1e-5


def inputs(rows: int, columns: int, parts: int, width: int = 512) -> tuple[Tensor, ...]:
    """x [rows, width], moments [rows, parts, 2], weight [columns, width], its row sums, bias; on a GPU if there is."""
    torch.manual_seed(rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = (torch.randn(rows, width, device=device) * 2 + 0.5).bfloat16()
    weight = (torch.randn(columns, width, device=device) * width**-0.5).bfloat16()
    split = x.float().unflatten(1, (parts, -1))
    moments = torch.stack([split.sum(2), split.square().sum(2)], 2)
    return x, moments, weight, weight.float().sum(1), torch.randn(columns, device=device)


def specification(x: Tensor, _: Tensor, weight: Tensor, __: Tensor, bias: Tensor) -> Tensor:
    normed = F.layer_norm(x.float(), (x.shape[1],), eps=EPS)
    return F.silu(F.linear(normed, weight.float(), bias))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_HOPPER and HAS_CUTE), reason="no Hopper GPU with CuTe DSL")
@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(1, 2048, 1), (63, 1024, 2), (64, 2048, 4), (65, 512, 1), (5_000, 2048, 2), (20_001, 1024, 2), (74_108, 2048, 2)],
)
def test_on_hopper_rows_of_any_number_equal_the_specification(rows: int, columns: int, parts: int) -> None:
    from kernels.fused_attention_layernorm import projection_hopper

    data = inputs(rows, columns, parts)
    assert projection_hopper.fits(data[0], data[2])
    torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").fill_(float("nan"))  # what `out` is likely to get
    found, again = (projection_hopper.project_in(*data, EPS) for _ in range(2))
    assert error(found, specification(*data)) < 3e-3
    assert torch.equal(found, again)


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_HOPPER and HAS_CUTE), reason="no Hopper GPU with CuTe DSL")
def test_on_hopper_a_captured_graph_projects_new_rows() -> None:
    x, *rest = inputs(SMALL_ROWS + 1, 2048, 2)
    project_in(x, *rest, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = project_in(x, *rest, EPS)
    new, moments, *_ = inputs(SMALL_ROWS + 1, 2048, 2)
    x.copy_(new.flip(0))
    rest[0].copy_(moments.flip(0))
    graph.replay()
    assert error(out, specification(x, *rest)) < 3e-3
    assert torch.equal(out, project_in(x, *rest, EPS))


def test_the_kernel_that_runs_everywhere_gives_the_specification() -> None:
    data = tuple(part.float() for part in inputs(70, 128, 1, width=64))
    assert error(project_in(*data, EPS), specification(*data)) < 5e-3


def test_another_device_than_hopper_has_no_such_kernel() -> None:
    assert import_projection_hopper(torch.device("cpu")) is None
