"""Outputs of more than 2^31 elements, and more programs than a grid's second axis allows: the last user's rows equal
those of the user alone. Needs a GPU with 40 GB; `test_far_rows.py` is the counterpart for a CPU."""

import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.op import fused_attention_layernorm
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.sequence_recommendation_interaction.op import candidate_interaction

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def test_scores_of_many_candidates_equal_those_of_the_last_user_alone() -> None:
    users = 2**15 + 1
    candidates = 2**16
    states = normal(users, 16)
    table = normal(1000, 16)
    rows = (torch.arange(candidates, device="cuda", dtype=torch.int32) % 1000).repeat(users, 1)
    scores = candidate_interaction(states, table, rows, check_values=False)
    assert scores.numel() > 2**31
    assert torch.equal(scores[-1:], candidate_interaction(states[-1:], table, rows[-1:]))


def test_fusion_of_many_events_equals_that_of_the_last_user_alone() -> None:
    users = 1025
    length = 4096
    width = 512
    events = users * length
    embeddings = (normal(1000, width), normal(9, width), normal(9, dtype=torch.float32))
    tokens = torch.randint(1000, (events,), device="cuda", dtype=torch.int32)
    columns = (tokens, torch.randint(9, (events, 2), device="cuda"), torch.zeros_like(tokens))
    offsets = torch.arange(users + 1, device="cuda") * length
    options = {"recent": length, "sessions": 1, "gap_s": 5}
    fused = hierarchical_sequence_fusion(*embeddings, *columns, offsets, **options)[0]
    assert fused.numel() > 2**31
    last = (column[-length:] for column in columns)
    alone = hierarchical_sequence_fusion(*embeddings, *last, offsets[:2], **options)[0]
    assert torch.equal(fused[-length:], alone)


def test_attention_and_gradients_of_many_users_equal_those_of_the_last_user_alone() -> None:
    users = 65_600
    length = 64
    heads = 2
    d_qk = 16
    d_v = 256
    total = users * length
    rows = [normal(total, heads, d).requires_grad_() for d in (d_qk, d_qk, d_v, d_v)]
    thresholds = torch.tensor([1, 10, 100], device="cuda", dtype=torch.int32)
    seconds = torch.arange(total, device="cuda", dtype=torch.int32) % length
    shapes = ((heads, 64), (heads, 4), (heads * d_v,), (heads * d_v,))
    tables = [normal(*shape, dtype=torch.float32) for shape in shapes]

    def attend(rows: list[Tensor], seconds: Tensor, last: bool = False) -> Tensor:
        offsets = torch.arange(len(seconds) // length + 1, device="cuda") * length
        plan = AttentionPlan.from_batch(seconds, offsets, thresholds, length, torch.bfloat16)
        return fused_attention_layernorm(*rows, *tables, plan, 1e-6, 64, last=last)

    y = attend(rows, seconds)
    assert y.numel() > 2**31
    last_user_rows = [part.detach()[-length:].requires_grad_() for part in rows]
    alone = attend(last_user_rows, seconds[-length:])
    assert torch.equal(y[-length:], alone)
    direction = normal(length, heads * d_v)
    grad_y = torch.zeros_like(y)
    grad_y[-length:] = direction
    gradients = torch.autograd.grad(y, rows, grad_y)
    expected = torch.autograd.grad(alone, last_user_rows, direction)
    assert all(torch.equal(one[-length:], other) for one, other in zip(gradients, expected, strict=True))
    q, k, v, u = (part.detach() for part in rows)
    last = attend([q[length - 1 :: length], k, v, u[length - 1 :: length]], seconds, last=True)
    torch.testing.assert_close(last[-1], alone[-1], rtol=2e-2, atol=2e-2)
