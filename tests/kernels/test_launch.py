"""The device that a kernel is launched on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.fused_attention_layernorm.launch import HOPPER_ROWS
from kernels.fused_attention_layernorm.projection import compute_row_stats, fold_norm, project_in
from kernels.launch import launch


class RecordingKernel:
    """Records each launch's grid, arguments and options, and the GPU that was current."""

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[int, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launches.append((self.current, grid, arguments, options))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.current = device.index or 0
        yield
        self.current = before


SECOND_GPU = pytest.param(
    "cuda:1", 1, marks=pytest.mark.skipif(torch.cuda.device_count() == 1, reason="torch refuses a fake second GPU here")
)


@pytest.mark.parametrize(("device", "current"), [SECOND_GPU, ("cuda:0", 0), ("cpu", 0)])
def test_kernel_is_launched_on_the_device_of_its_first_tensor(
    device: str, current: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = RecordingKernel()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: kernel.current)
    monkeypatch.setattr(torch.cuda, "device", kernel.device)
    with FakeTensorMode():
        x = torch.empty(3, device=device)
    launch(kernel, (7,), "a descriptor", x, 5, BLOCK_M=16)
    assert kernel.launches == [(current, (7,), ("a descriptor", x, 5), {"BLOCK_M": 16})]
    assert kernel.current == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
@pytest.mark.parametrize("rows", [HOPPER_ROWS, HOPPER_ROWS + 1])
def test_product_on_a_gpu_that_is_not_current_equals_that_on_the_current_one(rows: int) -> None:
    torch.manual_seed(0)
    shapes = ((rows, 512), (512, 512), (512,), (512,), (512,))
    parts = [torch.randn(*shape) for shape in shapes]
    results = []
    for device in ("cuda:0", "cuda:1"):
        x, weight, bias, gain, shift = (part.to(device) for part in parts)
        x = x.bfloat16()
        weights = fold_norm(weight, bias, gain, shift, torch.bfloat16)
        results.append(project_in(x, compute_row_stats(x), *weights, 1e-6).cpu())
    assert torch.equal(*results)
