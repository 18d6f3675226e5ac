"""When candidates suffice and when the overflow pass runs, at the boundaries; results equal the specification's."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.kernel import NO_BOUND
from kernels.sequence_recommendation_interaction.launch import ExcludedRows, ItemRows, TopKPlan
from kernels.sequence_recommendation_interaction.tiles import TopKTiles
from tests.kernels.sequence_recommendation_interaction.test_op import (
    DEVICE,
    OVERFLOWING,
    SAMPLED,
    SCARCE,
    TILES,
    UNSAMPLED,
    assert_run_equals_specification,
    on_device,
    random_integers,
    random_seen,
)


def ascending(items: int) -> Tensor:
    """float32 [items, 1]: for the state 1 the last row is the best, and the interpreter appends it last."""
    return torch.arange(float(items), device=DEVICE)[:, None]


def ones(users: int) -> Tensor:
    return torch.ones(users, 1, device=DEVICE)


def test_overflow_pass_excludes_ineligible_rows() -> None:
    catalogue = ItemRows(ascending(90), None, torch.arange(90, device=DEVICE) < 80)
    _, rows = assert_run_equals_specification(ones(1), catalogue, 6, None, OVERFLOWING)
    assert rows.tolist() == [[79, 78, 77, 76, 75, 74]]


def test_user_with_one_candidate_too_few_takes_the_overflow_pass() -> None:
    """Both users have seen the best rows, the second one more: k are left above the bound, and k - 1."""
    k = 5
    counts = [45, 46]
    states = ones(2)
    catalogue = ItemRows(ascending(300), None, None)
    seen = ExcludedRows(
        torch.cat([torch.arange(300 - count, 300) for count in counts]).to(DEVICE), on_device(0, 45, 91)
    )
    bounds = launch._bounds(states, catalogue, k, seen, SCARCE, 1)
    reached = (states @ catalogue.table.T >= bounds[:, None]).sum(1)
    assert (reached - on_device(*counts)).tolist() == [k, k - 1]
    assert_run_equals_specification(states, catalogue, k, seen, SCARCE)


def test_user_without_a_bound_takes_the_overflow_pass_beyond_the_capacity() -> None:
    catalogue = ItemRows(ascending(90), None, None)
    plan = TopKPlan(2, 16, TILES, capacity=16)
    assert launch._bounds(ones(1), catalogue, 16, None, plan, 1).item() == NO_BOUND.value
    assert_run_equals_specification(ones(1), catalogue, 16, None, plan)


@pytest.mark.parametrize("plan", [UNSAMPLED, SAMPLED, OVERFLOWING])
@pytest.mark.parametrize("num_infinite", [0, 50])
def test_minus_zero_equals_zero_and_minus_infinity_is_never_returned(plan: TopKPlan, num_infinite: int) -> None:
    """Zeros of either sign are ordered by row. The first rows score -inf: with 50, six zeros remain for k = 12."""
    k = 12
    row = torch.arange(90, device=DEVICE)
    table = (row < num_infinite).to(torch.int8)[:, None]
    scales = torch.where(row % 3 == 0, -2.0, 2.0)
    scales[:num_infinite] = -torch.inf
    catalogue = ItemRows(table, scales, row < 80)
    seen = ExcludedRows(row[50:74], on_device(0, 24))
    _, rows = assert_run_equals_specification(ones(1), catalogue, k, seen, plan)
    zeros = [*range(num_infinite, 50), *range(74, 80)]
    assert rows[0].tolist() == (zeros + [-1] * k)[:k]


def test_users_of_a_later_pass_keep_their_own_seen_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "USERS_PER_PASS", 3)
    users = 8
    items = 20
    catalogue = ItemRows(random_integers(2, items, 4), None, None)
    seen = random_seen(3, users, items, 8)
    assert_run_equals_specification(random_integers(1, users, 4), catalogue, 4, seen, UNSAMPLED)


@pytest.mark.parametrize(
    ("tiles", "has_ptx", "expected"),
    [
        (TopKTiles(64, 256, 16, 3), True, True),
        (TopKTiles(64, 256, 16, 3), False, False),
        (TopKTiles(32, 16, 4, 1), True, False),
        (TopKTiles(64, 16, 4, 1), True, True),
    ],
)
def test_only_filled_packs_on_nvidia_gpus_use_the_inline_code(
    tiles: TopKTiles, has_ptx: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inline code would append the scores that pad a pack."""
    launched: dict[Any, dict[str, Any]] = {}
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *_, **options: launched.update({kernel: options}))
    monkeypatch.setattr(torch.version, "cuda", "13.0" if has_ptx else None)
    with FakeTensorMode():
        states, table = (torch.empty(rows, 16, device="cuda") for rows in (40, 100))
        launch.top_k(states, ItemRows(table, None, None), 5, None, TopKPlan(0, 0, tiles), num_sms=1)
    assert launched[launch.kernel.filter_kernel]["USE_PTX"] is expected
