"""The kernels against the specification: on a CPU in Triton's interpreter, which does not support bfloat16."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fused_attention_layernorm.fallback import packed_reference
from kernels.fused_attention_layernorm.launch import SAFE_CONFIG, KernelConfig
from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THRESHOLDS = torch.tensor([0, 1, 2, 5, 11, 23, 47, 1000, 40_000], dtype=torch.int32, device=DEVICE)
MAX_EVENTS = 150
EPS = 1e-6
ALPHA = 0.5
# A row's sum has at most MAX_EVENTS terms; rounding q, k, v, the weights and the sum leaves an error of a few units in
# the type's last place, and the norm scales them equally.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """Inputs of the operator. rows: q, k, v, u, [total, heads, d] each; tables: both biases, norm weight and bias."""

    rows: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    seconds: Tensor
    offsets: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All tensors that have a gradient."""
        return *self.rows, *self.tables

    @property
    def last(self) -> Tensor:
        """Index of each user's last row."""
        return self.offsets[1:] - 1

    def with_last_queries(self) -> "Case":
        """The case for `last=True`: q and u of the last rows only."""
        q, k, v, u = self.rows
        return replace(self, rows=(q[self.last], k, v, u[self.last]))

    def require_grad(self) -> "Case":
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self

    def plan(self, max_length: int = MAX_EVENTS, **options: Any) -> AttentionPlan:
        """A plan with kernels. A max_length close to the users' lengths needs fewer programs."""
        options = {"kernels": True, **options}
        return AttentionPlan.from_batch(
            self.seconds, self.offsets, THRESHOLDS, max_length, self.rows[0].dtype, **options
        )

    def reference(self, num_contextual: int = 0, dropout: float = 0.0, seed: int = 0) -> Tensor:
        """The result of the specification, float32."""
        rows = [part.float() for part in self.rows]
        batch = (self.seconds, self.offsets, THRESHOLDS, torch.tensor(seed, device=DEVICE))
        return packed_reference(*rows, *self.tables, *batch, EPS, MAX_EVENTS, ALPHA, dropout, num_contextual)

    def run(self, plan: AttentionPlan, **options: Any) -> Tensor:
        """The result of the public call."""
        return fused_attention_layernorm(*self.rows, *self.tables, plan, EPS, MAX_EVENTS, ALPHA, **options)


def make_case(
    lengths: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float32, heads: int = 2, d: int = 16
) -> Case:
    """Random inputs of users with these lengths; values are twice as wide as queries."""
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE)

    steps = torch.tensor([0, 0, 1, 40, 5_000])[torch.randint(0, 5, (total,), generator=rng)]
    rows = tuple(normal(total, heads, width).to(dtype) for width in (d, d, 2 * d, 2 * d))
    tables = (normal(heads, MAX_EVENTS), normal(heads, 10), normal(heads * 2 * d), normal(heads * 2 * d))
    return Case(rows, tables, steps.cumsum(0).int().to(DEVICE), offsets.to(DEVICE))


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float(((result.float() - expected.float()).norm() / expected.float().norm()).detach())


def assert_all_equal(results: Any, expected: Any) -> None:
    """Assert equal bits of all tensors."""
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_all_near(results: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(results, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ([1], SAFE_CONFIG),
        ([0, 0, 3], SAFE_CONFIG),
        ([63, 64, 65], SAFE_CONFIG),
        ([150, 1, 1, 0, 2, 1], SAFE_CONFIG),
        ([5, 129, 70], KernelConfig(128, 64, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_equals_the_specification(lengths: list[int], config: KernelConfig, dtype: torch.dtype) -> None:
    case = make_case(lengths, dtype=dtype)
    result = case.run(case.plan(config=config))
    assert result.dtype == dtype
    assert relative_error(result, case.reference()) < TOLERANCES[dtype]


@settings(max_examples=10)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(0, 1000))
def test_attention_of_any_lengths_equals_the_specification(lengths: list[int], seed: int) -> None:
    case = make_case(lengths, seed=seed, heads=1)
    torch.testing.assert_close(case.run(case.plan()), case.reference(), rtol=1e-4, atol=1e-4)


def test_batch_without_rows_gives_no_rows() -> None:
    case = make_case([0, 0])
    assert case.run(case.plan()).shape == (0, 64)


@pytest.mark.parametrize(("num_contextual", "changed_rows"), [(0, [73, 74]), (2, [70, 71, 73, 74])])
def test_only_contextual_and_later_rows_see_a_row(num_contextual: int, changed_rows: list[int]) -> None:
    case = make_case([70, 5, 40])
    assert relative_error(case.run(case.plan(num_contextual=num_contextual)), case.reference(num_contextual)) < 1e-5
    k = case.rows[1].clone()
    k[70 + 3] = 9.0  # of the second user's five rows the fourth
    changed = replace(case, rows=(case.rows[0], k, *case.rows[2:]))
    before, after = (each.run(each.plan(num_contextual=num_contextual)) for each in (case, changed))
    assert (before != after).any(1).nonzero().flatten().tolist() == changed_rows


def test_last_rows_alone_equal_those_of_all_rows() -> None:
    case = make_case([1, 70, 33, 150])
    expected = case.reference()[case.last]
    last_queries = case.with_last_queries()
    for kernels in (True, False):
        assert relative_error(last_queries.run(case.plan(kernels=kernels), last=True), expected) < 1e-5


def test_nan_of_a_neighbour_does_not_spread() -> None:
    case = make_case([40, 40])
    for part in case.rows:
        part[40:] = float("nan")
    result = case.run(case.plan())
    assert result[:40].isfinite().all()
    assert result[40:].isnan().any()


def test_gradients_equal_those_of_the_specification() -> None:
    lengths = [1, 70, 3, 40]
    case = make_case(lengths).require_grad()
    direction = make_case(lengths, seed=5).rows[3].flatten(1)
    result = case.run(case.plan(num_contextual=2))
    expected = case.reference(2)
    gradients = [torch.autograd.grad((y * direction).sum(), case.leaves) for y in (result, expected)]
    assert_all_near(*gradients, tolerance=1e-5)


def test_reference_runs_and_differentiates_for_unsupported_head_widths() -> None:
    case = make_case([3, 20], d=12)  # not a power of two: there is no kernel
    for part in case.rows:
        part.requires_grad_()
    for kernels in (True, False):
        result = case.run(case.plan(kernels=kernels))
        torch.testing.assert_close(result, case.reference())
        result.sum().backward()


def on_device(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


class Attention(torch.nn.Module):
    """The public call with its plan, as a model has it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, seconds: Tensor, offsets: Tensor) -> Tensor:
        plan = AttentionPlan.from_batch(seconds, offsets, THRESHOLDS, MAX_EVENTS, q.dtype, kernels=True, trusted=True)
        return fused_attention_layernorm(q, k, v, u, *self.case.tables, plan, EPS, MAX_EVENTS, ALPHA)


def test_export_and_compile_keep_the_operator_intact() -> None:
    case = make_case([5, 20])
    inputs = (*case.rows, case.seconds, case.offsets)
    module = Attention(case)
    expected = module(*inputs)
    with torch.no_grad():
        exported = torch.export.export(module, inputs)
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert {"millrace.attention_plan.default", "millrace.attention_layernorm.default"} <= called
        torch.testing.assert_close(exported.module()(*inputs), expected)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected)


def passes_opcheck(operator: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether the operator's schema, fake and gradients pass torch's checks; raises where they do not."""
    return set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", [True, False])
def test_custom_operators_pass_opcheck(kernels: bool) -> None:
    case = make_case([3, 20], heads=1)
    ops = torch.ops.millrace
    plan = case.plan(kernels=kernels)
    q, k, v, u = case.rows
    batch = (plan.seconds, plan.offsets, plan.thresholds)
    # In one tile: no byte is left unwritten.
    one_tile = (plan.seconds[:20], on_device(0, 20).int(), THRESHOLDS, SAFE_CONFIG.block_m)
    tile = (SAFE_CONFIG.block_m, SAFE_CONFIG.block_n)
    assert passes_opcheck(ops.attention_plan.default, (*one_tile, *tile, 0, kernels))
    prepared = (plan.row_blocks, plan.time_buckets, torch.tensor(5, device=DEVICE))
    numbers = (EPS, MAX_EVENTS, ALPHA)
    config = [plan.config.block_m, plan.config.block_n, plan.config.stages, plan.config.max_registers]
    rest = (*batch, *prepared, *numbers, 0.25, 0, MAX_EVENTS, config, kernels)
    leaves = tuple(part.clone().requires_grad_(kernels) for part in case.leaves)
    assert passes_opcheck(ops.attention_layernorm.default, (*leaves, *rest))
    last_rows = (q[case.last], k, v, u[case.last])
    last_arguments = (*last_rows, *case.tables, *batch, *numbers, kernels)
    assert passes_opcheck(ops.attention_layernorm_last.default, last_arguments)
    if kernels:
        y, *saved = ops.attention_layernorm(*case.leaves, *rest)
        backward_inputs = (torch.ones_like(y), *saved, *case.leaves, plan.offsets, *prepared)
        sizes = (*numbers, 0.25, 0, MAX_EVENTS, *config[:2])
        assert passes_opcheck(ops.attention_layernorm_backward.default, (*backward_inputs, *sizes))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_gpu_equal_inputs_give_equal_bits_and_graphs_replay_them(dtype: torch.dtype) -> None:
    case = make_case([150, 1, 77, 0, 130], dtype=dtype, heads=4, d=32).require_grad()
    direction = torch.randn_like(case.rows[3].flatten(1))

    def result_and_gradients() -> list[Tensor]:
        result = case.run(case.plan(trusted=True))
        return [result, *torch.autograd.grad((result * direction).sum(), case.leaves)]

    first = result_and_gradients()
    second = result_and_gradients()
    assert relative_error(first[0], case.reference()) < TOLERANCES[dtype]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            static = case.run(case.plan(trusted=True))
        static.zero_()
        graph.replay()
        assert torch.equal(static, first[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_gpu_half_precision_gradients_are_near_the_specification() -> None:
    case = make_case([150, 1, 77, 130], dtype=torch.bfloat16, heads=4, d=32).require_grad()
    direction = torch.randn_like(case.rows[3].flatten(1))
    results = (case.run(case.plan()), case.reference())
    gradients = [torch.autograd.grad((y * direction).sum(), case.leaves) for y in results]
    assert_all_near(*gradients, tolerance=TOLERANCES[torch.bfloat16])
