"""The specification: HSTU's attention, normalisation and gate in naive, padded fp32.

Equations 2 and 3 of "Actions Speak Louder than Words" (Zhai et al., ICML 2024, arxiv.org/abs/2402.17152):
    A(X) V(X) = SiLU(Q(X) K(X)^T + rab^{p,t}) V(X) / N
    Y(X)      = Norm(A(X) V(X)) * U(X)              (the caller projects it by f2)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_attention_layernorm.dropout import keep_mask, keep_scale


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
    num_contextual: int = 0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Return Norm(A V) * U of right-padded users: float32 [users, length, heads * d_v], 0 in the padding.

    q, k: [users, length, heads, d_qk]; v, u: [users, length, heads, d_v]; all after SiLU.
    seconds: int [users, length], event times, ascending within a user; lengths: int [users].
    position_bias: [heads, max_events], indexed by the distance in events; time_bias: [heads, thresholds + 1], indexed
    by the number of `time_thresholds` (int, ascending, whole seconds) that do not exceed the elapsed time.
    norm_weight, norm_bias: [heads * d_v]. max_events: the constant N. alpha scales the dot products.
    num_contextual: the first rows that describe the user, not a moment; they see all rows.
    dropout: fraction of the weights to drop (rounded to 16 bits), chosen by seed, int64 []; the rest is scaled up.
    first_row: of the first user in the packed batch, where these users follow each other.
    """
    users, length = seconds.shape
    positions = torch.arange(length, device=seconds.device)
    row = positions[:, None]
    column = positions[None, :]
    visible = (column <= row) | (row < num_contextual)
    valid = visible & (row < lengths[:, None, None]) & (column < lengths[:, None, None])  # [users, length, length]
    elapsed = (seconds[:, :, None] - seconds[:, None, :]).clamp(min=0)
    bucket = torch.bucketize(elapsed, time_thresholds.to(elapsed.dtype), right=True)  # [users, length, length]
    bias = position_bias[:, (row - column).clamp(min=0)][None] + time_bias[:, bucket].transpose(0, 1)
    scores = alpha * torch.einsum("uihd,ujhd->uhij", q, k) + bias  # [users, heads, length, length]
    weights = F.silu(scores) / max_events * valid[:, None]
    if dropout:
        assert seed is not None
        weights = weights * dropout_weights(seed, lengths, length, scores.shape[1], dropout, first_row)
    attn_out = torch.einsum("uhij,ujhd->uihd", weights, v).reshape(users, length, -1)
    normed = F.layer_norm(attn_out, attn_out.shape[-1:], norm_weight, norm_bias, eps)
    return normed * u.reshape(users, length, -1) * (positions < lengths[:, None])[..., None]


def dropout_weights(
    seed: Tensor, lengths: Tensor, length: int, heads: int, dropout: float, first_row: int = 0
) -> Tensor:
    """Return float [users, heads, length, length]: 0 for a dropped weight, else 1 / (1 - p).

    The draw depends on a row's index in the packed batch, where users follow each other, not on the padding.
    """
    positions = torch.arange(length, device=lengths.device)
    rows = first_row + (lengths.cumsum(0) - lengths)[:, None, None, None] + positions[:, None]
    heads_index = torch.arange(heads, device=lengths.device)[:, None, None]
    return keep_mask(seed, rows, positions, heads_index, dropout) * keep_scale(dropout)
