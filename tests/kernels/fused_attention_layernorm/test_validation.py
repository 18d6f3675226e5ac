"""Strided inputs of the operator and its plan, and arguments that they reject."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan
from tests.kernels.fused_attention_layernorm.test_op import (
    DEVICE,
    EPS,
    MAX_EVENTS,
    THRESHOLDS,
    Case,
    assert_all_equal,
    make_case,
    on_device,
)

TABLES = ["position_bias", "time_bias", "norm_weight", "norm_bias"]


def strided(part: Tensor) -> Tensor:
    """The same values, each two elements from the next."""
    return torch.stack([part, torch.full_like(part, 77)], -1)[..., 0]


def with_row(case: Case, index: int, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with one of q, k, v, u changed."""
    return replace(case, rows=tuple(change(part) if i == index else part for i, part in enumerate(case.rows)))


def with_table(case: Case, index: int, change: Callable[[Tensor], Tensor]) -> Case:
    """The case with one of TABLES changed."""
    return replace(case, tables=tuple(change(part) if i == index else part for i, part in enumerate(case.tables)))


def test_strided_and_misaligned_rows_give_equal_bits() -> None:
    case = make_case([9, 40])
    wide = torch.cat([part.flatten(1) for part in case.rows], 1)
    sizes = [part.shape[1] * part.shape[2] for part in case.rows]
    slices = tuple(part.unflatten(1, (2, -1)) for part in wide.split(sizes, 1))
    misaligned = tuple(
        torch.empty(part.numel() + 1, device=DEVICE)[1:].view(part.shape).copy_(part) for part in case.rows
    )
    expected = case.run(case.plan())
    for rows in (slices, misaligned):
        changed = replace(case, rows=rows)
        assert_all_equal([changed.run(case.plan())], [expected])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("index", range(4), ids=TABLES)
def test_strided_tables_give_equal_bits(index: int, last: bool) -> None:
    case = make_case([9, 40])
    case = case.with_last_queries() if last else case
    changed = with_table(case, index, strided)
    plan = case.plan(max_length=40)
    assert_all_equal([changed.run(plan, last=last)], [case.run(plan, last=last)])


@pytest.mark.parametrize("index", [0, 2])
def test_strided_tables_give_equal_gradients(index: int) -> None:
    gradients = []
    for change in (Tensor.clone, strided):
        case = with_table(make_case([9, 20]), index, change).require_grad()
        result = case.run(case.plan(max_length=20))
        gradients.append(torch.autograd.grad(result.square().sum(), case.leaves))
    assert_all_equal(*gradients)


@pytest.mark.parametrize("name", ["seconds", "offsets", "thresholds"])
def test_plan_of_strided_columns_gives_equal_bits(name: str) -> None:
    case = make_case([9, 40])
    batch = {
        "seconds": case.seconds,
        "offsets": case.offsets.int(),
        "thresholds": THRESHOLDS,
    }
    plans = [
        AttentionPlan.from_batch(**columns, max_length=MAX_EVENTS, dtype=torch.float32, kernels=True)
        for columns in (batch, batch | {name: strided(batch[name])})
    ]
    expected, result = (case.run(plan) for plan in plans)
    assert_all_equal([result], [expected])


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("is torch.float64, expected float32, bfloat16", lambda case: with_row(case, 0, Tensor.double)),
        ("k is torch.float16", lambda case: with_row(case, 1, Tensor.half)),
        (r"v is torch.float32 \[3, 2, 32\]", lambda case: with_row(case, 2, lambda v: v[1:])),
        ("u is .* on meta", lambda case: with_row(case, 3, lambda u: u.to("meta"))),
        ("position_bias is", lambda case: with_table(case, 0, lambda table: table[:, 1:])),
        (r"time_bias is torch.float32 \[2, 9\]", lambda case: with_table(case, 1, lambda table: table[:, 1:])),
        ("norm_bias is torch.float16", lambda case: with_table(case, 3, Tensor.half)),
        ("q is .*at least one head", lambda case: replace(case, rows=tuple(part[:, :0] for part in case.rows))),
        ("seconds is torch.int64", lambda case: replace(case, seconds=case.seconds.long())),
        (r"offsets \[3\] must not decrease", lambda case: replace(case, offsets=on_device(0, 5, 4))),
        (
            r"offsets \[3\] must begin with 0 and end with 4",
            lambda case: replace(case, offsets=on_device(0, 1, 3)),
        ),
    ],
)
def test_invalid_argument_is_named_with_its_shape(message: str, change: Callable[[Case], Case]) -> None:
    invalid = change(make_case([1, 3]))
    with pytest.raises(ValueError, match=message):
        invalid.run(invalid.plan())


def test_user_longer_than_the_position_table_is_rejected() -> None:
    case = make_case([MAX_EVENTS + 1])
    with pytest.raises(ValueError, match=r"offsets \[2\] must leave no user more than the 150 rows"):
        case.plan()


def test_last_rows_alone_of_a_plan_with_contextual_rows_are_rejected() -> None:
    case = make_case([1])
    with pytest.raises(ValueError, match="last=True supports no contextual rows, expected a plan without its 2"):
        case.run(case.plan(num_contextual=2), last=True)


def test_debug_rejects_nan_and_infinity() -> None:
    case = make_case([2])
    case.rows[2][1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"v \[2, 2, 32\] holds NaN"):
        case.run(case.plan(), debug=True)
    case = make_case([2])
    case.tables[3][5] = float("inf")
    with pytest.raises(ValueError, match=r"norm_bias \[64\] holds NaN or infinity"):
        case.run(case.plan(), debug=True)


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 0.1, "seed": 2**70}, "expected 64 bits"),
        ({"dropout": 0.1, "seed": 1.5}, "seed is 1.5, expected an int64 tensor"),
    ],
)
def test_invalid_number_is_rejected(invalid: dict[str, Any], message: str) -> None:
    case = make_case([2])
    numbers = {"eps": EPS, "max_events": MAX_EVENTS} | invalid
    with pytest.raises(ValueError, match=message):
        fused_attention_layernorm(*case.rows, *case.tables, case.plan(), **numbers)


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"num_contextual": -1}, "num_contextual -1"),
        ({"max_length": -1}, "max_length is -1"),
    ],
)
def test_plan_that_no_kernel_supports_is_rejected(invalid: dict[str, Any], message: str) -> None:
    case = make_case([2])
    options: dict[str, Any] = {"max_length": MAX_EVENTS, "dtype": torch.float32} | invalid
    with pytest.raises(ValueError, match=message):
        AttentionPlan.from_batch(case.seconds, case.offsets, THRESHOLDS, **options)


@pytest.mark.parametrize("kernels", [True, False])
def test_plan_of_longer_users_than_the_position_table_is_rejected(kernels: bool) -> None:
    case = make_case([MAX_EVENTS + 10, 3])
    plan = case.plan(max_length=MAX_EVENTS + 50, kernels=kernels)
    q, k, v, u = case.rows
    for rows, last in ((case.rows, False), ((q[:2], k, v, u[:2]), True)):
        with pytest.raises(ValueError, match="max_length is 200, expected at most max_events, 150"):
            replace(case, rows=rows).run(plan, last=last)
