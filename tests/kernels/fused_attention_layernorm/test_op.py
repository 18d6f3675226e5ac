"""The kernels against the specification: on a CPU in Triton's interpreter, which knows no bfloat16."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fused_attention_layernorm.launch import SAFE_CONFIG, KernelConfig
from kernels.fused_attention_layernorm.op import fused_attention_layernorm, packed_reference
from kernels.fused_attention_layernorm.plan import AttentionPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THRESHOLDS = torch.tensor([0, 1, 2, 5, 11, 23, 47, 1000, 40_000], dtype=torch.int32, device=DEVICE)
EVENTS, EPS = 150, 1e-6
# A row's sum has at most EVENTS terms; what stays of a rounding of q, k, v, of the weights and of the sum is a few
# units of the type's last place, and the norm scales all alike.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """q, k, v, u: [total, heads, d]; weights: the two bias tables, the norm's weight and bias."""

    rows: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    seconds: Tensor
    offsets: Tensor

    def plan(self, **options: object) -> AttentionPlan:
        given = {"kernels": True, **options}
        return AttentionPlan.from_batch(self.seconds, self.offsets, THRESHOLDS, EVENTS, self.rows[0].dtype, **given)  # type: ignore[arg-type]  # a test's shorthand

    def specification(
        self, targets: Tensor | None = None, contextual: int = 0, dropout: float = 0.0, seed: int = 0
    ) -> Tensor:
        wide = [part.float() for part in self.rows]
        batch = (self.seconds, self.offsets, THRESHOLDS, targets, torch.tensor(seed, device=DEVICE))
        return packed_reference(*wide, *self.weights, *batch, EPS, EVENTS, 0.5, 1.0, dropout, contextual)

    def kernel(self, plan: AttentionPlan, **options: object) -> Tensor:
        return fused_attention_layernorm(*self.rows, *self.weights, plan, EPS, EVENTS, 0.5, **options)  # type: ignore[arg-type]  # a test's shorthand


def case_of(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32, heads: int = 2, d: int = 16) -> Case:
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(DEVICE)

    steps = torch.tensor([0, 0, 1, 40, 5_000])[torch.randint(0, 5, (total,), generator=random)]
    rows = tuple(normal(total, heads, width).to(dtype) for width in (d, d, 2 * d, 2 * d))
    weights = (normal(heads, EVENTS), normal(heads, 10), normal(heads * 2 * d), normal(heads * 2 * d))
    return Case(rows, weights, steps.cumsum(0).int().to(DEVICE), offsets.to(DEVICE))


def error(result: Tensor, wanted: Tensor) -> float:
    return float(((result.float() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize(
    ("lengths", "launch"),
    [
        ([1], SAFE_CONFIG),
        ([0, 0, 3], SAFE_CONFIG),
        ([63, 64, 65], SAFE_CONFIG),
        ([150, 1, 1, 0, 2, 1], SAFE_CONFIG),
        ([5, 129, 70], KernelConfig(128, 64, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_attention_equals_the_specification(
    lengths: list[int], launch: KernelConfig, dtype: torch.dtype
) -> None:
    case = case_of(lengths, dtype=dtype)
    result = case.kernel(case.plan(launch=launch))
    assert result.dtype == dtype
    assert error(result, case.specification()) < TOLERANCES[dtype]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_lengths_give_what_the_specification_gives(lengths: list[int], seed: int) -> None:
    case = case_of(lengths, seed, heads=1)
    torch.testing.assert_close(case.kernel(case.plan()), case.specification(), rtol=1e-4, atol=1e-4)


def test_no_rows_at_all_give_none() -> None:
    case = case_of([0, 0])
    assert case.kernel(case.plan()).shape == (0, 64)


def test_candidates_are_hidden_from_others_and_contextual_rows_see_all() -> None:
    case, targets = case_of([70, 5, 100]), torch.tensor([7, 4, 40], dtype=torch.int32, device=DEVICE)
    for contextual in (0, 3):
        result = case.kernel(case.plan(targets=targets, contextual=contextual))
        assert error(result, case.specification(targets, contextual)) < 1e-5
    k = case.rows[1].clone()
    k[70 + 4] = 9.0  # the second user's last candidate
    changed = replace(case, rows=(case.rows[0], k, *case.rows[2:]))
    before, after = (each.kernel(each.plan(targets=targets)) for each in (case, changed))
    differs = (before != after).any(1).nonzero().flatten().tolist()
    assert differs == [74]


def test_the_newest_rows_alone_equal_those_of_all() -> None:
    case = case_of([1, 70, 33, 150])
    newest = case.offsets[1:] - 1
    q, k, v, u = case.rows
    alone = replace(case, rows=(q[newest], k, v, u[newest]))
    assert error(alone.kernel(case.plan(), last=True), case.specification()[newest]) < 1e-5
    assert error(alone.kernel(case.plan(kernels=False), last=True), case.specification()[newest]) < 1e-5


def test_a_neighbours_nan_stays_with_the_neighbour() -> None:
    case = case_of([40, 40])
    for part in case.rows:
        part[40:] = float("nan")
    result = case.kernel(case.plan())
    assert result[:40].isfinite().all()
    assert result[40:].isnan().any()


def test_gradients_equal_those_of_the_specification() -> None:
    case = case_of([1, 70, 3, 90])
    targets = torch.tensor([0, 10, 1, 20], dtype=torch.int32, device=DEVICE)
    direction = case_of([1, 70, 3, 90], seed=5).rows[3].flatten(1)
    leaves = (*case.rows, *case.weights)
    gradients = []
    for form in (lambda: case.kernel(case.plan(targets=targets, contextual=2)), lambda: case.specification(targets, 2)):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        (form() * direction).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for result, wanted in zip(*gradients, strict=True):
        assert error(result, wanted) < 1e-5


def test_without_kernels_the_reference_answers_and_differentiates() -> None:
    case = case_of([3, 20], d=12)  # no power of two: no kernel either
    for part in case.rows:
        part.requires_grad_()
    for kernels in (True, False):
        result = case.kernel(case.plan(kernels=kernels))
        torch.testing.assert_close(result, case.specification())
        result.sum().backward()


def on_device(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


class Attention(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, seconds: Tensor, offsets: Tensor) -> Tensor:
        plan = AttentionPlan.from_batch(seconds, offsets, THRESHOLDS, EVENTS, q.dtype, kernels=True, trusted=True)
        return fused_attention_layernorm(q, k, v, u, *self.case.weights, plan, EPS, EVENTS, 0.5)


def test_export_and_compile_pass_it_through_whole() -> None:
    case = case_of([5, 20])
    inputs, module = (*case.rows, case.seconds, case.offsets), Attention(case)
    wanted = module(*inputs)
    with torch.no_grad():
        exported = torch.export.export(module, inputs)
        called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        assert {"millrace.attention_plan.default", "millrace.attention_layernorm.default"} <= called
        torch.testing.assert_close(exported.module()(*inputs), wanted)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), wanted)


def sound(operator: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether torch finds its schema, its fake and its gradients in order; it raises where they are not."""
    return set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernels", [True, False])
def test_torch_finds_no_fault_with_the_operators_it_is_told_of(kernels: bool) -> None:
    case, ops = case_of([3, 20], heads=1), torch.ops.millrace
    plan, (q, k, v, u) = case.plan(kernels=kernels), case.rows
    launch, batch = plan.config, (plan.seconds, plan.offsets, plan.thresholds)
    one = (plan.seconds[:20], on_device(0, 20).int(), THRESHOLDS, SAFE_CONFIG.block_m)  # in one tile: no byte is left unwritten
    assert sound(ops.attention_plan.default, (*one, SAFE_CONFIG.block_m, SAFE_CONFIG.block_n, 0, kernels))
    prepared = (plan.num_targets, plan.row_blocks, plan.time_buckets, torch.tensor(5, device=DEVICE))
    numbers, tile = (EPS, EVENTS, 0.5), [launch.block_m, launch.block_n, launch.stages, launch.max_registers]
    whole = (*batch, *prepared, *numbers, 1.0, 0.25, 0, EVENTS, tile, kernels)
    leaves = tuple(part.clone().requires_grad_(kernels) for part in (*case.rows, *case.weights))
    assert sound(ops.attention_layernorm.default, (*leaves, *whole))
    newest = case.offsets[1:] - 1
    last = (q[newest], k, v, u[newest], *case.weights, *batch, *numbers, 1.0, kernels)
    assert sound(ops.attention_layernorm_last.default, last)
    if kernels:
        y, *kept = ops.attention_layernorm(*case.rows, *case.weights, *whole)
        above = (torch.ones_like(y), *kept, *case.rows, *case.weights, plan.offsets, *prepared)
        sizes = (*numbers, 0.25, 0, EVENTS, *tile[:2])
        assert sound(ops.attention_layernorm_backward.default, (*above, *sizes))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_equal_inputs_give_equal_bits_and_graphs_replay_them(dtype: torch.dtype) -> None:
    case = case_of([150, 1, 77, 0, 130], dtype=dtype, heads=4, d=32)
    direction = torch.randn_like(case.rows[3].flatten(1))
    for leaf in (*case.rows, *case.weights):
        leaf.requires_grad_()

    def bits() -> list[Tensor]:
        result = case.kernel(case.plan(trusted=True))
        return [result, *torch.autograd.grad((result * direction).sum(), [*case.rows, *case.weights])]

    first, second = bits(), bits()
    assert error(first[0], case.specification()) < TOLERANCES[dtype]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            static = case.kernel(case.plan(trusted=True))
        static.zero_()
        graph.replay()
        assert torch.equal(static, first[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_half_precision_gradients_follow_the_specification() -> None:
    case = case_of([150, 1, 77, 130], dtype=torch.bfloat16, heads=4, d=32)
    direction = torch.randn_like(case.rows[3].flatten(1))
    leaves = [leaf.requires_grad_() for leaf in (*case.rows, *case.weights)]
    result, wanted = (
        torch.autograd.grad((form() * direction).sum(), leaves)
        for form in (lambda: case.kernel(case.plan()), case.specification)
    )
    for one, other in zip(result, wanted, strict=True):
        assert error(one, other.float()) < TOLERANCES[torch.bfloat16]
