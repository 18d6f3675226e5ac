"""The specification: HSTU's attention, its normalisation and its gate, naive, padded, in fp32.

Equations 2 and 3 of "Actions Speak Louder than Words" (Zhai et al., ICML 2024, arxiv.org/abs/2402.17152):
    A(X) V(X) = SiLU(Q(X) K(X)^T + rab^{p,t}) V(X) / N
    Y(X)      = Norm(A(X) V(X)) * U(X)              (the caller projects it by f2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.dropout import is_kept, weight_of


def fused_attention_layernorm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    seconds: Tensor,
    lengths: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    time_thresholds: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    max_events: int,
    alpha: float = 1.0,
    contextual: int = 0,
    targets: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Norm(A V) * U of right-padded users: float32 [users, length, heads * d_v]; rows beyond a user's length are 0.

    q, k: [users, length, heads, d_qk]; v, u: [users, length, heads, d_v], all after SiLU.
    seconds: int [users, length], times of the events, ascending within a user; lengths: int [users].
    position_bias: [heads, max_events], by the number of events between; time_bias: [heads, thresholds + 1], by how many
    of `time_thresholds` (int, ascending, whole seconds) are not above the time between.
    norm_weight, norm_bias: [heads * d_v]. max_events: the constant N. alpha scales the dot products.
    contextual: that many first rows describe the user, not a moment: they see all rows but the targets.
    targets: int [users], that many last rows are candidates: no other row sees one.
    dropout: the share of weights that are left out (to 16 bits), as seed, int64 [], says; the others count for them.
    """
    users, length = seconds.shape
    slots = torch.arange(length, device=seconds.device)
    row, column = slots[:, None], slots[None, :]
    seen = lengths if targets is None else lengths - targets
    earlier = ((column < row) | (row < contextual)) & (column < seen[:, None, None])
    valid = ((column == row) | earlier) & (row < lengths[:, None, None])  # [users, length, length]
    elapsed = (seconds[:, :, None] - seconds[:, None, :]).clamp(min=0)
    bucket = (elapsed[..., None] >= time_thresholds).sum(-1)  # [users, length, length]
    bias = position_bias[:, (row - column).clamp(min=0)][None] + time_bias[:, bucket].transpose(0, 1)
    scores = alpha * torch.einsum("uihd,ujhd->uhij", q, k) + bias  # [users, heads, length, length]
    weights = F.silu(scores) / max_events * valid[:, None]
    if dropout:
        assert seed is not None
        weights = weights * kept(seed, lengths, length, scores.shape[1], dropout)
    attended = torch.einsum("uhij,ujhd->uihd", weights, v).reshape(users, length, -1)
    normed = F.layer_norm(attended, attended.shape[-1:], norm_weight, norm_bias, eps)
    return normed * u.reshape(users, length, -1) * (slots < lengths[:, None])[..., None]


def kept(seed: Tensor, lengths: Tensor, length: int, heads: int, dropout: float) -> Tensor:
    """float [users, heads, length, length]: 0 for a dropped weight, else what makes up for those. Users follow each
    other: a row's number in the packed batch counts, not the padding."""
    slots = torch.arange(length, device=lengths.device)
    rows = (lengths.cumsum(0) - lengths)[:, None, None, None] + slots[:, None]
    mask = is_kept(seed, rows, slots, torch.arange(heads, device=lengths.device)[:, None, None], dropout)
    return mask * weight_of(dropout)
