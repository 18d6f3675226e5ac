"""The reference on packed rows: any chunks of users give the same, and none needs memory for all of them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.fused_attention_layernorm import fallback
from kernels.fused_attention_layernorm.fallback import chunks_of_users, packed_reference

HEADS = 2
WIDTH = 4
THRESHOLDS = torch.arange(48, dtype=torch.int32) * 7


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.nbytes = max(self.nbytes, each.numel() * each.element_size())
        return result


def run(lengths: list[int], dropout: float = 0.0, num_contextual: int = 0, grad: bool = False) -> list[Tensor]:
    """Return the result, and with `grad` the gradients of q, k, v, u and the biases."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(offsets[-1])
    longest = max(lengths, default=0) or 1
    rows = [torch.randn(total, HEADS, WIDTH, generator=generator) for _ in range(4)]
    tables = [torch.randn(HEADS, size, generator=generator) for size in (longest, len(THRESHOLDS) + 1)]
    norms = [torch.randn(HEADS * WIDTH, generator=generator) for _ in range(2)]
    seconds = torch.cat([torch.arange(length) * 3 for length in lengths] or [torch.zeros(0)]).int()
    parts = [part.requires_grad_(grad) for part in (*rows, *tables, *norms)]
    seed = torch.tensor(5)
    y = packed_reference(*parts, seconds, offsets, THRESHOLDS, seed, 1e-6, longest, 0.5, dropout, num_contextual)
    if grad:
        y.square().sum().backward()
        return [y.detach(), *(part.grad for part in parts if part.grad is not None)]
    return [y]


@given(
    lengths=st.lists(st.integers(0, 9), max_size=7),
    dropout=st.sampled_from([0.0, 0.4]),
    contextual=st.integers(0, 2),
    chunk=st.integers(1, 300),
)
def test_results_and_gradients_do_not_depend_on_the_chunks(
    lengths: list[int], dropout: float, contextual: int, chunk: int
) -> None:
    at_once = run(lengths, dropout, contextual, grad=sum(lengths) > 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "CHUNK_SCORES", chunk)
        in_chunks = run(lengths, dropout, contextual, grad=sum(lengths) > 0)
    for one, other in zip(at_once, in_chunks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 50), max_size=40))
def test_chunks_hold_every_row_once_and_stay_within_the_bound(lengths: list[int]) -> None:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fallback, "CHUNK_SCORES", 2000)
        chunks = list(chunks_of_users(bounds, HEADS))
    assert [row for first, last in chunks for row in range(bounds[first], bounds[last])] == list(range(bounds[-1]))
    assert all(bounds[one[1]] == bounds[other[0]] for one, other in pairwise(chunks))
    for first, last in chunks:
        longest = max(lengths[first:last])
        assert longest
        assert last == first + 1 or (last - first) * HEADS * longest**2 <= 2000


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [[128] * 64, [300], [1, 200] * 20], ids=["equal", "one", "mixed"])
def test_no_tensor_grows_with_the_number_of_users_or_of_time_buckets(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], grad: bool
) -> None:
    monkeypatch.setattr(fallback, "CHUNK_SCORES", 1 << 16)
    kept = 0

    def keep(part: Tensor) -> Tensor:
        nonlocal kept
        kept += part.numel() * part.element_size()
        return part

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        run(lengths, grad=grad)
    rows_bytes = 4 * HEADS * WIDTH * sum(lengths)
    assert largest.nbytes <= max(8 * max(1 << 16, HEADS * max(lengths) ** 2), rows_bytes)
    assert grad or not kept
