"""Where a kernel is launched."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.fused_attention_layernorm.projection import HOPPER_ROWS, fold_norm, project_in, compute_row_stats
from kernels.launch import launch


class Recorded:
    """As a kernel: remembers each launch's grid, arguments and options, and the GPU that was current."""

    def __init__(self) -> None:
        self.current, self.launches = 0, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.current, grid, arguments, options))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index or 0
        yield
        self.current = before


SECOND = pytest.param(
    "cuda:1", 1, marks=pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch refuses a fake second GPU here")
)


@pytest.mark.parametrize(("place", "current"), [SECOND, ("cuda:0", 0), ("cpu", 0)])
def test_a_kernel_is_launched_on_the_device_of_its_first_tensor(place, current, monkeypatch):
    kernel = Recorded()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: kernel.current)
    monkeypatch.setattr(torch.cuda, "device", kernel.device)
    with FakeTensorMode():
        x = torch.empty(3, device=place)
    launch(kernel, (7,), "a descriptor", x, 5, ROWS=16)
    assert kernel.launches == [(current, (7,), ("a descriptor", x, 5), {"ROWS": 16})]
    assert kernel.current == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@pytest.mark.parametrize("rows", [HOPPER_ROWS, HOPPER_ROWS + 1])
def test_on_a_gpu_that_is_not_the_current_one_a_product_is_what_it_is_on_that(rows):
    torch.manual_seed(0)
    shapes = ((rows, 512), (512, 512), (512,), (512,), (512,))
    parts, found = [torch.randn(*shape) for shape in shapes], []
    for device in ("cuda:0", "cuda:1"):
        x, weight, bias, gain, shift = (part.to(device) for part in parts)
        x = x.bfloat16()
        weights = fold_norm(weight, bias, gain, shift, torch.bfloat16)
        found.append(project_in(x, compute_row_stats(x), *weights, 1e-6).cpu())
    assert torch.equal(*found)
