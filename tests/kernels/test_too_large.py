"""Sizes that the kernels' int32 indices cannot represent are rejected; nothing of these sizes is allocated."""

import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction

MAX_ROWS = 2**31 - 2**16  # of a batch, for attention and fusion


def repeated(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor of equal values, which takes one element in memory."""
    return torch.tensor(value, dtype=dtype).expand(shape)


def make_plan(rows: int, thresholds: Tensor) -> AttentionPlan:
    return AttentionPlan.from_batch(repeated(0, rows), torch.tensor([0, rows]), thresholds, rows, torch.float32)


def test_attention_rejects_more_rows_than_it_can_index() -> None:
    """The largest batch is accepted: only its thresholds are invalid."""
    decreasing = torch.tensor([2, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"offsets \[2\] must end with at most {MAX_ROWS} rows"):
        make_plan(MAX_ROWS + 1, decreasing)
    with pytest.raises(ValueError, match=r"thresholds \[2\] must not decrease"):
        make_plan(MAX_ROWS, decreasing)


def test_attention_rejects_more_thresholds_than_a_byte_has_buckets() -> None:
    with pytest.raises(ValueError, match=r"thresholds is torch.int32 \[256\] .* at most 255"):
        make_plan(1, repeated(1, 256))


@pytest.mark.parametrize(
    ("events", "features", "recent", "message"),
    [
        (MAX_ROWS + 1, 1, 4, rf"offsets \[2\] must end with at most {MAX_ROWS} events"),
        (3, 33, 4, r"feature_ids is torch.int32 \[3, 33\] .* up to 32"),
        (3, 1, 2**16, "recent = 65536, sessions = 1"),
    ],
)
def test_fusion_rejects_more_events_features_or_rows_than_it_can_index(
    events: int, features: int, recent: int, message: str
) -> None:
    table = torch.zeros(9, 8)
    tokens = repeated(-1, events)  # -1 would be rejected too, by a later check
    feature_ids = repeated(0, events, features)
    columns = (tokens, feature_ids, repeated(0, events), torch.tensor([0, events]))
    with pytest.raises(ValueError, match=message):
        hierarchical_sequence_fusion(table, table, torch.zeros(9), *columns, recent=recent, sessions=1, gap_s=5)


@pytest.mark.parametrize(("items", "width", "name"), [(2**30 + 1, 8, "table"), (12, 513, "states"), (12, 0, "states")])
def test_top_k_rejects_more_items_or_wider_rows_than_it_supports(items: int, width: int, name: str) -> None:
    states, table = (torch.empty(rows, width, device="meta") for rows in (2, items))
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 \[\d+, {width}\] on meta"):
        sequence_recommendation_interaction(states, table, 3, check_values=False)
    with pytest.raises(ValueError, match=rf"{name} is torch.float32 \[\d+, {width}\] on meta"):
        candidate_interaction(states, table, torch.empty(2, 4, device="meta").int(), check_values=False)


def test_top_k_accepts_the_largest_catalogue_and_the_widest_rows() -> None:
    states, table = (torch.empty(rows, 512, device="meta") for rows in (2, 2**30))
    assert sequence_recommendation_interaction(states, table, 512, check_values=False)[1].shape == (2, 512)
