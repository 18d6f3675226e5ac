"""The device that a kernel is launched on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import launch as launching
from kernels.fused_attention_layernorm.gate_projection import LARGE, select_tiles
from kernels.fused_attention_layernorm.launch import HOPPER_ROWS, SAFE_CONFIG, can_use_ptx, kernel_config_for
from kernels.fused_attention_layernorm.projection import compute_row_stats, fold_norm, project_in
from kernels.launch import is_nvidia, launch
from kernels.sequence_recommendation_interaction import tiles
from kernels.sequence_recommendation_interaction.tiles import TileLimits


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


@pytest.mark.parametrize(("cuda", "expected"), [("13.0", True), (None, False)], ids=["NVIDIA", "AMD"])
def test_ptx_and_tables_by_capability_are_for_nvidias_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, expected: bool
) -> None:
    """AMD's GPUs are `cuda` to torch, and have numbers that look like compute capabilities."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launching, "max_shared_bytes", lambda device: 65_536)
    monkeypatch.setattr(tiles, "max_shared_bytes", lambda device: 65_536)
    device = torch.device("cuda:0")
    assert is_nvidia(device) is expected
    assert (kernel_config_for(device, torch.bfloat16, 1000) != SAFE_CONFIG) is expected
    assert TileLimits.from_device(device).capability == ((9, 0) if expected else (0, 0))
    with FakeTensorMode():
        x = torch.empty(5000, LARGE.block_n, dtype=torch.bfloat16, device=device)
        assert can_use_ptx(x) is expected
        assert (select_tiles(x, x) is not None) is expected
    assert not is_nvidia(torch.device("cpu"))
