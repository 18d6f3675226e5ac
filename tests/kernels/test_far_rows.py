"""Element indices beyond 2^31: rows so far apart that 32 bits do not reach the last ones, against the same rows dense.

On a CPU, memory that is never touched costs nothing; on a GPU these rows take some gigabytes for a moment.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.hierarchical_sequence_fusion import launch as fusion
from kernels.hierarchical_sequence_fusion.launch import Embeddings, EventColumns
from kernels.sequence_recommendation_interaction import launch as retrieval
from kernels.sequence_recommendation_interaction.launch import ItemRows, TopKPlan
from kernels.sequence_recommendation_interaction.tiles import TopKTiles
from tests.kernels.fused_attention_layernorm.test_op import DEVICE, Case, assert_all_equal, make_case

REACH = 2**31 + 2**20
TILES = TopKTiles(block_items=16, block_users=16, warps=4, stages=1)
ROWS = ["q", "k", "v", "u"]


def far_apart(dense: Tensor, reach: int = REACH) -> Tensor:
    """The same rows; the last one begins `reach` elements, or a few more, after the first."""
    stride = -(-reach // (len(dense) - 1) // 64) * 64 + 64
    memory = torch.empty((len(dense) - 1) * stride + dense[0].numel(), dtype=dense.dtype, device=dense.device)
    return memory.as_strided(dense.shape, (stride, *dense.stride()[1:])).copy_(dense)


def random_integers(seed: int, *shape: int) -> Tensor:
    """Small integers: every sum is exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


@pytest.mark.parametrize("plan", [TopKPlan(0, 0, TILES, 512), TopKPlan(2, 4, TILES, 512), TopKPlan(2, 4, TILES, 16)])
@pytest.mark.parametrize("far", ["states", "table"])
def test_top_k_of_far_rows_equals_that_of_dense_rows(plan: TopKPlan, far: str) -> None:
    states = random_integers(1, 3, 24)
    table = random_integers(2, 90, 24)
    expected = retrieval.top_k(states, ItemRows(table, None, None), 5, None, plan, num_sms=1)
    states, table = (far_apart(states), table) if far == "states" else (states, far_apart(table))
    result = retrieval.top_k(states, ItemRows(table, None, None), 5, None, plan, num_sms=1)
    assert_all_equal(result, expected)


def test_top_k_and_candidate_scores_of_a_far_int8_table_equal_those_of_a_dense_one() -> None:
    states = random_integers(3, 3, 24)
    table = random_integers(4, 90, 24).to(torch.int8)
    scales = 2.0 ** random_integers(5, 90).float()
    rows = torch.arange(90, device=DEVICE).repeat(3, 1)
    dense, far = (ItemRows(each, scales, None) for each in (table, far_apart(table)))
    plan = TopKPlan(0, 0, TILES, 512)
    result, expected = (retrieval.top_k(states, each, 5, None, plan, num_sms=1) for each in (far, dense))
    assert_all_equal(result, expected)
    scores = retrieval.candidate_scores(far_apart(states), far, rows)
    assert torch.equal(scores, retrieval.candidate_scores(states, dense, rows))


def half_precision(case: Case) -> Case:
    return replace(case, rows=tuple(part.half() for part in case.rows))


def with_far_row(case: Case, index: int) -> Case:
    """The case with one of ROWS far apart."""
    return replace(case, rows=tuple(far_apart(x) if i == index else x for i, x in enumerate(case.rows)))


@pytest.mark.parametrize("lengths", [[34], [33, 1]], ids=["far_row_of_a_user", "far_first_row_of_a_user"])
@pytest.mark.parametrize("index", range(4), ids=ROWS)
def test_attention_and_gradients_of_far_rows_equal_those_of_dense_rows(index: int, lengths: list[int]) -> None:
    """Lengths reach a second tile; the last row begins past 2^31."""
    dense = half_precision(make_case(lengths, heads=1))
    outputs = []
    for case in (dense, with_far_row(dense, index)):
        for row in case.rows:
            row.requires_grad_()
        y = case.run(case.plan(max(lengths)))
        outputs.append([y, *torch.autograd.grad(y.float().square().sum(), case.rows)])
    assert_all_equal(*outputs)


@pytest.mark.parametrize("index", range(4), ids=ROWS)
def test_last_attention_of_far_rows_equals_that_of_dense_rows(index: int) -> None:
    dense = half_precision(make_case([3, 9, 2], heads=1)).with_last_queries()
    far = with_far_row(dense, index)
    assert torch.equal(far.run(far.plan(), last=True), dense.run(dense.plan(), last=True))


def make_fusion_inputs() -> tuple[Embeddings, EventColumns]:
    rng = torch.Generator().manual_seed(6)
    table, features = (torch.randn(rows, 24, generator=rng).half().to(DEVICE) for rows in (40, 9))
    tokens = torch.arange(30, device=DEVICE).int()
    feature_ids = torch.randint(0, 9, (30, 32), generator=rng).int().to(DEVICE)
    log_strength = torch.randn(9, generator=rng).to(DEVICE)
    events = EventColumns(tokens, feature_ids, tokens // 4 * 5, torch.tensor([0, 11, 30], device=DEVICE))
    return Embeddings(table, features, log_strength), events


def fuse(embeddings: Embeddings, events: EventColumns) -> tuple[Tensor, Tensor, Tensor]:
    return fusion.fuse(embeddings, events, recent=3, sessions=2, gap_s=5)


@pytest.mark.parametrize("far", ["table", "features"])
def test_fusion_of_far_rows_equals_that_of_dense_rows(far: str) -> None:
    """Unsigned 32 bits do not reach the far rows either."""
    dense, events = make_fusion_inputs()
    embeddings = replace(dense, **{far: far_apart(getattr(dense, far), 2**32 + 2**20)})
    assert_all_equal(fuse(embeddings, events), fuse(dense, events))


def test_fusion_of_late_events_equals_that_of_the_same_events_alone() -> None:
    """The events before them belong to no user."""
    embeddings, events = make_fusion_inputs()
    before = REACH // 32
    columns = []
    for column in (events.tokens, events.feature_ids, events.seconds):
        columns.append(torch.empty((before + 30, *column.shape[1:]), dtype=column.dtype, device=DEVICE))
        columns[-1][before:] = column
    late = EventColumns(*columns, events.offsets + before)
    expected = fuse(embeddings, events)
    rows = int(expected[2][-1])
    for one, other in zip(fuse(embeddings, late)[:2], expected[:2], strict=True):
        assert torch.equal(one[:rows], other[:rows])
