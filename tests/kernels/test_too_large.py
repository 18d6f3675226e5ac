"""Sizes that the kernels' int32 numbers cannot tell apart are refused; nothing of these sizes is allocated."""

import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction

MAX_ROWS = 2**31 - 2**16  # of a batch, attention's and fusion's


def repeated(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """One element in memory."""
    return torch.tensor(value, dtype=dtype).expand(shape)


def attention_of(rows: int, thresholds: Tensor) -> AttentionPlan:
    return AttentionPlan.from_batch(repeated(0, rows), torch.tensor([0, rows]), thresholds, rows, torch.float32)


def test_attention_refuses_a_row_more_than_it_can_number():
    """The last row of the largest batch is numbered: what is wrong with that batch is its thresholds."""
    falling = torch.tensor([2, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"offsets \[2\] must end with at most {MAX_ROWS} rows"):
        attention_of(MAX_ROWS + 1, falling)
    with pytest.raises(ValueError, match=r"thresholds \[2\] must not decrease"):
        attention_of(MAX_ROWS, falling)


def test_attention_refuses_more_thresholds_than_a_byte_has_buckets_for():
    with pytest.raises(ValueError, match=r"thresholds is torch.int32 \[256\] .* at most 255"):
        attention_of(1, repeated(1, 256))


@pytest.mark.parametrize(
    ("events", "features", "recent", "message"),
    [
        (MAX_ROWS + 1, 1, 4, rf"offsets \[2\] must end with at most {MAX_ROWS} events"),
        (3, 33, 4, r"codes is torch.int32 \[3, 33\] .* up to 32"),
        (3, 1, 2**16, "recent = 65536, sessions = 1"),
    ],
)
def test_fusion_refuses_more_events_features_or_tokens_than_it_can_number(events, features, recent, message):
    table, strength, offsets = torch.zeros(9, 8), torch.zeros(9), torch.tensor([0, events])
    tokens, codes = repeated(-1, events), repeated(0, events, features)  # a token of -1 is refused too, later
    arguments = (table, table, strength, tokens, codes, repeated(0, events), offsets)
    with pytest.raises(ValueError, match=message):
        hierarchical_sequence_fusion(*arguments, recent=recent, sessions=1, gap_s=5)


@pytest.mark.parametrize(("items", "width", "name"), [(2**30 + 1, 8, "table"), (12, 513, "states"), (12, 0, "states")])
def test_top_k_refuses_more_items_or_wider_rows_than_it_can_hold(items, width, name):
    states, table = (torch.empty(rows, width, device="meta") for rows in (2, items))
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 \[\d+, {width}\] on meta"):
        sequence_recommendation_interaction(states, table, 3, check_values=False)
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 \[\d+, {width}\] on meta"):
        candidate_interaction(states, table, torch.empty(2, 4, device="meta").int(), check_values=False)


def test_top_k_takes_the_largest_catalogue_and_the_widest_rows():
    states, table = (torch.empty(rows, 512, device="meta") for rows in (2, 2**30))
    assert sequence_recommendation_interaction(states, table, 512, check_values=False)[1].shape == (2, 512)
