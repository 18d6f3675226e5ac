"""Fixtures of the kernel tests."""

import pytest
import torch

from kernels.fused_attention_layernorm import backward, gate_norm


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch three programs instead of hundreds in the interpreter, each with more iterations of its loop.

    Their numbers only spread the same sums over a GPU.
    """
    if not torch.cuda.is_available():
        monkeypatch.setattr(backward, "SPLITS", 3)
        monkeypatch.setattr(gate_norm, "BACKWARD_PROGRAMS", 3)
