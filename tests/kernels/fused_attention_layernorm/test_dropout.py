"""Dropout of attention weights: the kernels draw the same bits as the specification, forward and backward."""

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
    ALPHA,
    DEVICE,
    EPS,
    MAX_EVENTS,
    THRESHOLDS,
    TOLERANCES,
    Case,
    assert_all_near,
    make_case,
    relative_error,
)

SEED = 0x1234_5678_9ABC_DEF


def keep_mask(rate: float, seed: int = SEED) -> Tensor:
    """Return the mask, bool [4 heads, 300 rows, 300 columns]."""
    head, row, column = (torch.arange(size) for size in (4, 300, 300))
    return dropout.keep_mask(torch.tensor(seed), row[:, None], column, head[:, None, None], rate)


def gradients(result: Tensor, case: Case) -> list[Tensor]:
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return list(torch.autograd.grad((result * direction).sum(), case.leaves))


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize(
    ("lengths", "heads", "config"),
    [([3, 33, 1], 2, SAFE_CONFIG), ([0, 2, 70], 1, SAFE_CONFIG), ([5, 129, 7], 1, KernelConfig(128, 64, 2))],
)
def test_results_and_gradients_with_dropout_equal_the_specification(
    lengths: list[int], heads: int, config: KernelConfig, rate: float
) -> None:
    case = make_case(lengths, heads=heads).require_grad()
    plan = case.plan(max(lengths), num_contextual=2, config=config)
    result = case.run(plan, dropout=rate, seed=SEED)
    expected = case.reference(2, rate, SEED)
    assert relative_error(result, expected) < TOLERANCES[torch.float32]
    assert_all_near(gradients(result, case), gradients(expected, case), TOLERANCES[torch.float32])


@settings(max_examples=8)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=3), st.floats(0.01, 0.99), st.integers(-(2**63), 2**63 - 1))
def test_any_lengths_rate_and_seed_equal_the_specification(lengths: list[int], rate: float, seed: int) -> None:
    case = make_case(lengths, heads=1)
    result = case.run(case.plan(), dropout=rate, seed=seed)
    torch.testing.assert_close(result, case.reference(0, rate, seed), rtol=1e-4, atol=1e-4)


def test_half_precision_drops_the_same_weights() -> None:
    case = make_case([31, 32, 33], dtype=torch.float16)
    result = case.run(case.plan(), dropout=0.3, seed=7)
    assert relative_error(result, case.reference(0, 0.3, 7)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.75])
def test_fraction_kept_is_one_minus_rate_along_rows_columns_and_heads(rate: float) -> None:
    kept = keep_mask(rate).float()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < 5 * deviation / kept.numel() ** 0.5
    for axis in (0, 1, 2):  # the fraction of each line of n draws is within 6 deviations
        n = kept.shape[axis]
        if n > 100:
            assert float((kept.mean(axis) - (1 - rate)).abs().max()) < 6 * deviation / n**0.5


def test_neighbours_heads_and_seeds_are_independent() -> None:
    kept = keep_mask(0.5).float() - 0.5
    others = [kept.roll(1, axis) for axis in (0, 1, 2)] + [kept.roll(8, 2), keep_mask(0.5, SEED + 1).float() - 0.5]
    for other in others:  # the mean of n products of +-1/4 has deviation 1/4 / sqrt(n)
        assert abs(float((kept * other).mean())) < 5 * 0.25 / kept.numel() ** 0.5


def test_philox_gives_the_published_words() -> None:
    """Random123's kat_vectors have ten rounds; seven are their beginning."""
    zero = torch.zeros((), dtype=torch.int64)
    words = dropout.philox((zero, zero), zero, zero, zero, zero, rounds=10)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not() -> None:
    case = make_case([40, 3])
    from_int, again = (case.run(case.plan(), dropout=0.2, seed=5) for _ in range(2))
    from_tensor = case.run(case.plan(), dropout=0.2, seed=torch.tensor(5, device=DEVICE))
    other = case.run(case.plan(), dropout=0.2, seed=5 + 2**32)  # differs in the high word only
    assert torch.equal(from_int, again)
    assert torch.equal(from_int, from_tensor)
    assert not torch.allclose(from_int, other)


def test_seed_without_dropout_changes_no_bit() -> None:
    case = make_case([40, 3])
    assert torch.equal(case.run(case.plan()), case.run(case.plan(), dropout=0.0, seed=5))


def test_reference_without_kernels_drops_the_same_and_differentiates() -> None:
    case = make_case([3, 20], d=12).require_grad()
    result = case.run(case.plan(kernels=False), dropout=0.4, seed=SEED)
    torch.testing.assert_close(result, case.reference(0, 0.4, SEED))
    gradients(result, case)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_that_is_not_a_probability_is_rejected(rate: float) -> None:
    case = make_case([3])
    with pytest.raises(ValueError, match=f"dropout is {rate}, expected a probability from 0 up to but not 1"):
        case.run(case.plan(), dropout=rate, seed=0)


def test_dropout_requires_a_seed_of_its_type_and_all_rows() -> None:
    case = make_case([1])
    with pytest.raises(ValueError, match=r"seed is None with dropout 0.1, expected an int64 tensor \[\]"):
        case.run(case.plan(), dropout=0.1)
    with pytest.raises(ValueError, match=r"seed is torch.int32 \[1\].* expected torch.int64 \[\]"):
        case.run(case.plan(), dropout=0.1, seed=torch.zeros(1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"last=True is for inference, expected no dropout instead of 0.1"):
        case.run(case.plan(), dropout=0.1, seed=0, last=True)


class Attention(torch.nn.Module):
    """The public call with its plan and a seed, as a model has it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, seed: Tensor) -> Tensor:
        case = self.case
        plan = AttentionPlan.from_batch(
            case.seconds, case.offsets, THRESHOLDS, MAX_EVENTS, q.dtype, kernels=True, trusted=True
        )
        rows = (q, *case.rows[1:])
        return fused_attention_layernorm(*rows, *case.tables, plan, EPS, MAX_EVENTS, ALPHA, dropout=0.3, seed=seed)


def test_compiled_step_reads_its_seed_at_each_call() -> None:
    case = make_case([5, 20])
    module = Attention(case)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    results = []
    for seed in (torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)):
        results.append(compiled(case.rows[0], seed))
        torch.testing.assert_close(results[-1], module(case.rows[0], seed))
    assert not torch.allclose(*results)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_gpu_half_precision_is_near_the_specification_and_graphs_read_their_seed() -> None:
    case = make_case([150, 1, 77, 130], dtype=torch.bfloat16, heads=4, d=32).require_grad()
    result = case.run(case.plan(), dropout=0.2, seed=5)
    expected = case.reference(0, 0.2, 5)
    assert relative_error(result, expected) < TOLERANCES[torch.bfloat16]
    assert_all_near(gradients(result, case), gradients(expected, case), TOLERANCES[torch.bfloat16])
    seed = torch.tensor(0, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            static = case.run(case.plan(trusted=True), dropout=0.2, seed=seed)
        seed.fill_(5)
        graph.replay()
        assert torch.equal(static, result)
