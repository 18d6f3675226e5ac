"""Element indices beyond 2^31: rows so far apart that 32 bits do not reach the last ones, against the same rows dense.

On a CPU memory that nobody touches costs nothing; on a GPU these rows take some gigabytes for a moment.
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
from tests.kernels.fused_attention_layernorm.test_op import DEVICE, Case, case_of

REACH = 2**31 + 2**20
TILES = TopKTiles(block_items=16, block_users=16, warps=4, stages=1)


def far_apart(dense: Tensor, reach: int = REACH) -> Tensor:
    """The same rows; the last one begins `reach` elements, or a few more, after the first."""
    stride = -(-reach // (len(dense) - 1) // 64) * 64 + 64
    room = torch.empty((len(dense) - 1) * stride + dense[0].numel(), dtype=dense.dtype, device=dense.device)
    return room.as_strided(dense.shape, (stride, *dense.stride()[1:])).copy_(dense)


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Small integers: every sum is exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


@pytest.mark.parametrize("plan", [TopKPlan(0, 0, TILES, 512), TopKPlan(2, 4, TILES, 512), TopKPlan(2, 4, TILES, 16)])
@pytest.mark.parametrize("far", ["states", "table"])
def test_far_states_and_a_far_table_have_the_same_best_items(plan: TopKPlan, far: str):
    states, table = whole_numbers(1, 3, 24), whole_numbers(2, 90, 24)
    wanted = retrieval.top_k(states, ItemRows(table, None, None), 5, None, plan, num_sms=1)
    states, table = (far_apart(states), table) if far == "states" else (states, far_apart(table))
    found = retrieval.top_k(states, ItemRows(table, None, None), 5, None, plan, num_sms=1)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_far_rows_of_an_int8_table_have_the_same_best_items_and_candidates():
    states, table = whole_numbers(3, 3, 24), whole_numbers(4, 90, 24).to(torch.int8)
    scales = 2.0 ** whole_numbers(5, 90).float()
    rows = torch.arange(90, device=DEVICE).repeat(3, 1)
    near, far = (ItemRows(each, scales, None) for each in (table, far_apart(table)))
    plan = TopKPlan(0, 0, TILES, 512)
    found, wanted = (retrieval.top_k(states, each, 5, None, plan, num_sms=1) for each in (far, near))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    found = retrieval.candidate_scores(far_apart(states), far, rows)
    assert torch.equal(found, retrieval.candidate_scores(states, near, rows))


def halves(case: Case) -> Case:
    return replace(case, rows=tuple(part.half() for part in case.rows))


@pytest.mark.parametrize("part", range(4), ids=["q", "k", "v", "u"])
def test_attention_and_its_gradients_read_far_rows_as_they_lie(part: int):
    """One user, so that rows of one user pass 2^31; and two, so that a user's first row does."""
    for lengths in ([70], [66, 5]):
        near = halves(case_of(lengths, heads=1))
        far = replace(near, rows=tuple(far_apart(x) if at == part else x for at, x in enumerate(near.rows)))
        outputs = []
        for case in (near, far):
            for leaf in case.rows:
                leaf.requires_grad_()
            y = case.kernel(case.plan())
            outputs.append([y, *torch.autograd.grad(y.float().square().sum(), case.rows)])
        assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("part", range(4), ids=["q", "k", "v", "u"])
def test_the_newest_rows_read_far_rows_as_they_lie(part: int):
    near = halves(case_of([3, 9, 2], heads=1))
    newest = near.offsets[1:] - 1
    rows = [x[newest] if at in (0, 3) else x for at, x in enumerate(near.rows)]
    near, far = (
        replace(near, rows=tuple(change(x) if at == part else x for at, x in enumerate(rows)))
        for change in (lambda x: x, far_apart)
    )
    assert torch.equal(far.kernel(far.plan(), last=True), near.kernel(near.plan(), last=True))


def fusion_inputs() -> tuple[Embeddings, EventColumns]:
    random = torch.Generator().manual_seed(6)
    table, features = (torch.randn(rows, 24, generator=random).half().to(DEVICE) for rows in (40, 9))
    events, codes = torch.arange(30, device=DEVICE), torch.randint(0, 9, (30, 32), generator=random).int()
    strength = torch.randn(9, generator=random).to(DEVICE)
    packed = EventColumns(
        events.int(), codes.to(DEVICE), events.int() // 4 * 5, torch.tensor([0, 11, 30], device=DEVICE)
    )
    return Embeddings(table, features, strength), packed


def fused(embeddings: Embeddings, events: EventColumns) -> list[Tensor]:
    return list(fusion.fuse(embeddings, events, recent=3, sessions=2, gap_s=5))


@pytest.mark.parametrize("far", ["table", "features"])
def test_fusion_reads_far_rows_as_they_lie(far: str):
    """32 bits without a sign do not reach the far rows either."""
    near, events = fusion_inputs()
    apart = replace(near, **{far: far_apart(getattr(near, far), 2**32 + 2**20)})
    assert all(torch.equal(one, other) for one, other in zip(fused(apart, events), fused(near, events), strict=True))


def test_fusion_reads_the_codes_of_events_behind_many_others():
    """The events before belong to nobody here."""
    embeddings, near = fusion_inputs()
    before = REACH // 32
    columns = []
    for column in (near.tokens, near.feature_ids, near.seconds):
        columns.append(torch.empty((before + 30, *column.shape[1:]), dtype=column.dtype, device=DEVICE))
        columns[-1][before:] = column
    far = EventColumns(*columns, near.offsets + before)
    wanted = fused(embeddings, near)
    rows = int(wanted[2][-1])
    for one, other in zip(fused(embeddings, far)[:2], wanted[:2], strict=True):
        assert torch.equal(one[:rows], other[:rows])
