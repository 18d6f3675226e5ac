"""Who is answered from the candidates and who is rescued, at the edges; the answers are the specification's."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.kernel import NO_BOUND
from kernels.sequence_recommendation_interaction.launch import ItemRows, Seen, TopKPlan
from kernels.sequence_recommendation_interaction.tiles import TopKTiles
from tests.kernels.sequence_recommendation_interaction.test_op import (
    DEVICE,
    OVERFLOWING,
    SAMPLED,
    SCARCE,
    TILES,
    WHOLE,
    assert_same,
    kernels,
    on_device,
    random_seen,
    specified,
    whole_numbers,
)


def ascending(items: int) -> torch.Tensor:
    """float32 [items, 1]: for the state 1 the last row is the best, and the interpreter appends it last."""
    return torch.arange(float(items), device=DEVICE)[:, None]


def ones(users: int) -> torch.Tensor:
    return torch.ones(users, 1, device=DEVICE)


def test_a_rescue_leaves_out_rows_that_nobody_may_get():
    catalogue = ItemRows(ascending(90), None, torch.arange(90, device=DEVICE) < 80)
    found = kernels(ones(1), catalogue, 6, None, OVERFLOWING)
    assert_same(found, specified(ones(1), catalogue, 6, None))
    assert found[1].tolist() == [[79, 78, 77, 76, 75, 74]]


def test_a_user_is_rescued_who_has_one_candidate_less_than_wanted():
    """Each user has seen the best rows, the next one more of them: k are left above the bound, and k - 1."""
    k, counts = 5, [45, 46]
    catalogue, states = ItemRows(ascending(300), None, None), ones(2)
    seen = Seen(torch.cat([torch.arange(300 - count, 300) for count in counts]).to(DEVICE), on_device(0, 45, 91))
    bounds = launch._bounds(states, catalogue, k, seen, SCARCE, 1)
    reached = (states @ catalogue.table.T >= bounds[:, None]).sum(1)
    assert (reached - on_device(*counts)).tolist() == [k, k - 1]
    assert_same(kernels(states, catalogue, k, seen, SCARCE), specified(states, catalogue, k, seen))


def test_a_user_without_a_bound_is_rescued_when_places_run_out():
    catalogue, plan = ItemRows(ascending(90), None, None), TopKPlan(2, 16, TILES, capacity=16)
    assert launch._bounds(ones(1), catalogue, 16, None, plan, 1).item() == NO_BOUND.value
    assert_same(kernels(ones(1), catalogue, 16, None, plan), specified(ones(1), catalogue, 16, None))


@pytest.mark.parametrize("plan", [WHOLE, SAMPLED, OVERFLOWING])
@pytest.mark.parametrize("lowest", [0, 50])
def test_minus_zero_is_zero_and_minus_infinity_no_score(plan, lowest):
    """Zeros of either sign go by row. Rows before `lowest` score -inf: with 50, six zeros stay unseen, of k = 12."""
    row, k = torch.arange(90, device=DEVICE), 12
    table, scales = (row < lowest).to(torch.int8)[:, None], torch.where(row % 3 == 0, -2.0, 2.0)
    scales[:lowest] = -torch.inf
    catalogue, seen = ItemRows(table, scales, row < 80), Seen(row[50:74], on_device(0, 24))
    scores, rows = kernels(ones(1), catalogue, k, seen, plan)
    assert_same((scores, rows), specified(ones(1), catalogue, k, seen))
    zeros = [*range(lowest, 50), *range(74, 80)]
    assert rows[0].tolist() == (zeros + [-1] * k)[:k]


def test_users_of_a_later_batch_keep_their_own_seen_rows(monkeypatch):
    monkeypatch.setattr(launch, "USERS_AT_ONCE", 3)
    users, items = 8, 20
    states, catalogue = whole_numbers(1, users, 4), ItemRows(whole_numbers(2, items, 4), None, None)
    seen = random_seen(3, users, items, 8)
    assert_same(kernels(states, catalogue, 4, seen, WHOLE), specified(states, catalogue, 4, seen))


@pytest.mark.parametrize(
    ("tiles", "nvidia", "fast"),
    [
        (TopKTiles(64, 256, 16, 3), True, True),
        (TopKTiles(64, 256, 16, 3), False, False),
        (TopKTiles(32, 16, 4, 1), True, False),
        (TopKTiles(64, 16, 4, 1), True, True),
    ],
)  # fmt: skip
def test_only_whole_packs_on_nvidias_gpus_are_appended_by_the_inline_code(tiles, nvidia, fast, monkeypatch):
    """The inline code would append the scores that pad a pack."""
    launched = {}
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *_, **options: launched.update({kernel: options}))
    monkeypatch.setattr(launch, "FAST", nvidia)
    with FakeTensorMode():
        states, table = (torch.empty(rows, 16, device="cuda") for rows in (40, 100))
        launch.top_k(states, ItemRows(table, None, None), 5, None, TopKPlan(0, 0, tiles), num_sms=1)
    assert launched[launch.kernel.filter_kernel]["FAST"] is fast
