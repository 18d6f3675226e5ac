"""Dropout of attention weights: the kernels draw what the specification draws, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fused_attention_layernorm import dropout
from kernels.fused_attention_layernorm.launch import SAFE_CONFIG, KernelConfig
from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan
from tests.kernels.fused_attention_layernorm.test_op import (
    DEVICE,
    EPS,
    EVENTS,
    THRESHOLDS,
    TOLERANCES,
    Case,
    case_of,
    error,
)

SEED = 0x1234_5678_9ABC_DEF


def mask(share: float, seed: int = SEED, rows: int = 300, columns: int = 300, heads: int = 4) -> Tensor:
    """bool [heads, rows, columns]"""
    row, column, head = (torch.arange(n) for n in (rows, columns, heads))
    return dropout.keep_mask(torch.tensor(seed), row[:, None], column, head[:, None, None], share)


def gradients(result: Tensor, case: Case) -> list[Tensor]:
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return list(torch.autograd.grad((result * direction).sum(), [*case.rows, *case.weights]))


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize(
    ("lengths", "launch"), [([1, 70, 3, 90], SAFE_CONFIG), ([0, 65, 150, 2], SAFE_CONFIG), ([5, 129, 70], KernelConfig(128, 64, 2))]
)
def test_kernels_and_their_gradients_drop_what_the_specification_drops(
    lengths: list[int], launch: KernelConfig, share: float
) -> None:
    case = case_of(lengths)
    for leaf in (*case.rows, *case.weights):
        leaf.requires_grad_()
    targets = torch.tensor([length // 4 for length in lengths], dtype=torch.int32, device=DEVICE)
    plan = case.plan(targets=targets, contextual=2, launch=launch)
    result, wanted = case.kernel(plan, dropout=share, seed=SEED), case.specification(targets, 2, share, SEED)
    assert error(result, wanted) < TOLERANCES[torch.float32]
    for one, other in zip(gradients(result, case), gradients(wanted, case), strict=True):
        assert error(one, other) < TOLERANCES[torch.float32]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=4), st.floats(0.01, 0.99), st.integers(-(2**63), 2**63 - 1))
def test_any_lengths_share_and_seed_give_what_the_specification_gives(
    lengths: list[int], share: float, seed: int
) -> None:
    case = case_of(lengths, heads=1)
    result, wanted = case.kernel(case.plan(), dropout=share, seed=seed), case.specification(None, 0, share, seed)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_drops_the_same_weights() -> None:
    case = case_of([63, 64, 65], dtype=torch.float16)
    result = case.kernel(case.plan(), dropout=0.3, seed=7)
    assert error(result, case.specification(None, 0, 0.3, 7)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.75])
def test_the_kept_share_is_one_minus_p_along_rows_columns_and_heads(share: float) -> None:
    kept = mask(share).float()
    spread = (share * (1 - share)) ** 0.5
    assert abs(float(kept.mean()) - (1 - share)) < 5 * spread / kept.numel() ** 0.5
    for along in (0, 1, 2):  # each line's share, of n draws, within 6 deviations
        n = kept.shape[along]
        if n > 100:
            assert float((kept.mean(along) - (1 - share)).abs().max()) < 6 * spread / n**0.5


def test_neighbours_heads_and_seeds_are_independent() -> None:
    kept = mask(0.5).float() - 0.5
    others = [kept.roll(1, axis) for axis in (0, 1, 2)] + [kept.roll(8, 2), mask(0.5, SEED + 1).float() - 0.5]
    for other in others:  # the mean of n products of +-1/4 has deviation 1/4 / sqrt(n)
        assert abs(float((kept * other).mean())) < 5 * 0.25 / kept.numel() ** 0.5


def test_philox_gives_the_published_words() -> None:
    """Of the ten rounds in Random123's kat_vectors; seven are their beginning."""
    zero = torch.zeros((), dtype=torch.int64)
    words = dropout.philox((zero, zero), zero, zero, zero, zero, rounds=10)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_seed_repeats_its_bits_and_another_gives_others() -> None:
    case = case_of([70, 33])
    as_int, again = (case.kernel(case.plan(), dropout=0.2, seed=5) for _ in range(2))
    as_tensor = case.kernel(case.plan(), dropout=0.2, seed=torch.tensor(5, device=DEVICE))
    other = case.kernel(case.plan(), dropout=0.2, seed=5 + 2**32)  # the high word counts
    assert torch.equal(as_int, again)
    assert torch.equal(as_int, as_tensor)
    assert not torch.allclose(as_int, other)


def test_without_dropout_a_seed_changes_no_bit() -> None:
    case = case_of([70, 33])
    assert torch.equal(case.kernel(case.plan()), case.kernel(case.plan(), dropout=0.0, seed=5))


def test_without_kernels_the_reference_drops_the_same_and_differentiates() -> None:
    case = case_of([3, 20], d=12)
    for leaf in (*case.rows, *case.weights):
        leaf.requires_grad_()
    result = case.kernel(case.plan(kernels=False), dropout=0.4, seed=SEED)
    torch.testing.assert_close(result, case.specification(None, 0, 0.4, SEED))
    gradients(result, case)


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(share: float) -> None:
    case = case_of([3])
    with pytest.raises(ValueError, match=f"dropout is {share}, wanted a probability from 0 up to but not 1"):
        case.kernel(case.plan(), dropout=share, seed=0)


def test_dropout_needs_a_seed_of_its_type_and_all_rows() -> None:
    case = case_of([1])
    with pytest.raises(ValueError, match=r"seed is None with dropout 0.1, wanted an int64 tensor \[\]"):
        case.kernel(case.plan(), dropout=0.1)
    with pytest.raises(ValueError, match=r"seed is torch.int32 \[1\].* wanted torch.int64 \[\]"):
        case.kernel(case.plan(), dropout=0.1, seed=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"last=True is for inference, wanted no dropout instead of 0.1"):
        case.kernel(case.plan(), dropout=0.1, seed=0, last=True)


class Attention(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, seed: Tensor) -> Tensor:
        case = self.case
        plan = AttentionPlan.from_batch(
            case.seconds, case.offsets, THRESHOLDS, EVENTS, q.dtype, kernels=True, trusted=True
        )
        rows = (q, *case.rows[1:])
        return fused_attention_layernorm(*rows, *case.weights, plan, EPS, EVENTS, 0.5, dropout=0.3, seed=seed)


def test_a_compiled_step_reads_its_seed_anew() -> None:
    case = case_of([5, 20])
    module = Attention(case)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    results = []
    for seed in (torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)):
        results.append(compiled(case.rows[0], seed))
        torch.testing.assert_close(results[-1], module(case.rows[0], seed))
    assert not torch.allclose(*results)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_half_precision_follows_the_specification_and_a_graph_reads_its_seed_anew() -> None:
    case = case_of([150, 1, 77, 130], dtype=torch.bfloat16, heads=4, d=32)
    for leaf in (*case.rows, *case.weights):
        leaf.requires_grad_()
    result, wanted = case.kernel(case.plan(), dropout=0.2, seed=5), case.specification(None, 0, 0.2, 5)
    assert error(result, wanted) < TOLERANCES[torch.bfloat16]
    for one, other in zip(gradients(result, case), gradients(wanted, case), strict=True):
        assert error(one, other.float()) < TOLERANCES[torch.bfloat16]
    seed, graph = torch.tensor(0, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            static = case.kernel(case.plan(trusted=True), dropout=0.2, seed=seed)
        seed.fill_(5)
        graph.replay()
        assert torch.equal(static, result)
