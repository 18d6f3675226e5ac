"""What the operator and its plan do with rows that lie apart, and what they refuse; the kernels run, on a CPU in
Triton's interpreter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan
from tests.kernels.fused_attention_layernorm.test_op import DEVICE, EPS, EVENTS, THRESHOLDS, Case, case_of, on_device


def test_rows_of_a_wider_table_and_misaligned_ones_are_read_as_they_lie() -> None:
    case = case_of([9, 70])
    wide = torch.cat([part.flatten(1) for part in case.rows], 1)
    sizes = [part.shape[1] * part.shape[2] for part in case.rows]
    sliced = tuple(part.unflatten(1, (2, -1)) for part in wide.split(sizes, 1))
    flat = [torch.empty(part.numel() + 1, device=DEVICE)[1:].view(part.shape).copy_(part) for part in case.rows]
    wanted = case.kernel(case.plan())
    for rows in (sliced, tuple(flat)):
        torch.testing.assert_close(replace(case, rows=rows).kernel(case.plan()), wanted, rtol=0, atol=0)


def apart(part: Tensor) -> Tensor:
    """The same values, each two elements from the next."""
    return torch.stack([part, torch.full_like(part, 77)], -1)[..., 0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("place", range(4), ids=["position_bias", "time_bias", "norm_weight", "norm_bias"])
def test_tables_whose_elements_lie_apart_are_the_same(place: int, last: bool) -> None:
    case = case_of([9, 70])
    if last:
        newest = case.offsets[1:] - 1
        q, k, v, u = case.rows
        case = replace(case, rows=(q[newest], k, v, u[newest]))
    strange = replace(case, **weights_with(case, place, apart))  # type: ignore[arg-type]  # of mixed fields
    wanted = case.kernel(case.plan(), last=last)
    torch.testing.assert_close(strange.kernel(strange.plan(), last=last), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 2])
def test_gradients_of_tables_whose_elements_lie_apart_are_the_same(place: int) -> None:
    gradients = []
    for change in (Tensor.clone, apart):
        case = case_of([9, 20])
        case = replace(case, **weights_with(case, place, change))  # type: ignore[arg-type]  # of mixed fields
        inputs = [part.requires_grad_() for part in (*case.rows, *case.weights)]
        gradients.append(torch.autograd.grad(case.kernel(case.plan()).square().sum(), inputs))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["seconds", "offsets", "thresholds", "targets"])
def test_columns_of_a_plan_whose_elements_lie_apart_are_the_same(name: str) -> None:
    case = case_of([9, 70])
    batch = {
        "seconds": case.seconds, "offsets": case.offsets.int(), "thresholds": THRESHOLDS,
        "targets": on_device(2, 3).int(),
    }  # fmt: skip
    plans = [
        AttentionPlan.from_batch(**given, max_length=EVENTS, dtype=torch.float32, kernels=True)
        for given in (batch, batch | {name: apart(batch[name])})
    ]
    found, wanted = (case.kernel(plan) for plan in plans)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def rows_with(case: Case, place: int, change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    return {"rows": tuple(change(part) if at == place else part for at, part in enumerate(case.rows))}


def weights_with(case: Case, place: int, change: Callable[[Tensor], Tensor]) -> dict[str, object]:
    return {"weights": tuple(change(part) if at == place else part for at, part in enumerate(case.weights))}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("is torch.float64, wanted float32, bfloat16", lambda case: rows_with(case, 0, Tensor.double)),
        ("k is torch.float16", lambda case: rows_with(case, 1, Tensor.half)),
        (r"v is torch.float32 \[3, 2, 32\]", lambda case: rows_with(case, 2, lambda v: v[1:])),
        ("u is .* on meta", lambda case: rows_with(case, 3, lambda u: u.to("meta"))),
        ("position_bias is", lambda case: weights_with(case, 0, lambda table: table[:, 1:])),
        (r"time_bias is torch.float32 \[2, 9\]", lambda case: weights_with(case, 1, lambda table: table[:, 1:])),
        ("norm_bias is torch.float16", lambda case: weights_with(case, 3, Tensor.half)),
        ("q is .*a head at least", lambda case: {"rows": tuple(part[:, :0] for part in case.rows)}),
        ("seconds is torch.int64", lambda case: {"seconds": case.seconds.long()}),
        (r"offsets \[3\] must not decrease", lambda case: {"offsets": on_device(0, 5, 4)}),
        (r"offsets \[3\] must begin with 0 and end with 4", lambda case: {"offsets": on_device(0, 1, 3)}),
    ],
)
def test_a_wrong_argument_is_named_with_its_shape(message: str, change: Callable[[Case], dict[str, object]]) -> None:
    case = case_of([1, 3])
    wrong = replace(case, **change(case))  # type: ignore[arg-type]  # of mixed fields
    with pytest.raises(ValueError, match=message):
        wrong.kernel(wrong.plan())


def test_a_user_longer_than_the_table_and_nan_are_refused() -> None:
    case = case_of([EVENTS + 1])
    with pytest.raises(ValueError, match=r"offsets \[2\] must leave no user more than the 150 rows"):
        case.plan()
    case = case_of([2])
    case.rows[2][1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"v \[2, 2, 32\] holds NaN"):
        case.kernel(case.plan(), debug=True)
    case = case_of([2])
    case.weights[3][5] = float("inf")
    with pytest.raises(ValueError, match=r"norm_bias \[64\] holds NaN or infinity"):
        case.kernel(case.plan(), debug=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 0.1, "seed": 2**70}, "wanted 64 bits"),
        ({"dropout": 0.1, "seed": 1.5}, "seed is 1.5, wanted an int64 tensor"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    case = case_of([2])
    numbers = {"eps": EPS, "max_events": EVENTS} | wrong
    with pytest.raises(ValueError, match=message):
        fused_attention_layernorm(*case.rows, *case.weights, case.plan(), **numbers)  # type: ignore[arg-type]  # a test's shorthand


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"contextual": -1}, "contextual -1"),
        ({"max_length": -1}, "max_length is -1"),
    ],
)
def test_a_plan_of_what_no_kernel_knows_is_refused(wrong: dict[str, object], message: str) -> None:
    case = case_of([2])
    given = {"max_length": EVENTS, "dtype": torch.float32} | wrong
    with pytest.raises(ValueError, match=message):
        AttentionPlan.from_batch(case.seconds, case.offsets, THRESHOLDS, **given)  # type: ignore[arg-type]  # a test's shorthand


@pytest.mark.parametrize("kernels", [True, False])
def test_a_plan_of_longer_users_than_the_table_has_columns_is_refused(kernels: bool) -> None:
    case = case_of([EVENTS + 10, 3])
    plan = AttentionPlan.from_batch(case.seconds, case.offsets, THRESHOLDS, EVENTS + 50, torch.float32, kernels=kernels)
    q, k, v, u = case.rows
    for rows, last in ((case.rows, False), ((q[:2], k, v, u[:2]), True)):
        with pytest.raises(ValueError, match="max_length is 200, wanted at most max_events, 150"):
            replace(case, rows=rows).kernel(plan, last=last)
