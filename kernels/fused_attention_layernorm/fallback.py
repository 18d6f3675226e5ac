"""The reference on packed rows, a few users at a time: slower than the kernels, but within memory for any batch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.fused_attention_layernorm.reference import fused_attention_layernorm

# Scores at a time: 64 MiB in float32, of which some ten exist at once. More only for a single user's.
CHUNK_SCORES = 1 << 24


def packed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    thresholds: Tensor,
    seed: Tensor | None,
    eps: float,
    max_events: int,
    alpha: float,
    dropout: float,
    num_contextual: int,
) -> Tensor:
    """Run the reference on packed rows: pad, compute in float32, pack again, chunk by chunk of users.

    Gradients compute each chunk again, so that no chunk's scores are kept.
    """
    tables = (position_bias, time_bias, norm_weight, norm_bias)
    run = partial(_run_chunk, thresholds=thresholds, seed=seed, eps=eps, max_events=max_events, alpha=alpha)
    run = partial(run, dropout=dropout, num_contextual=num_contextual)
    needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v, u, *tables))
    bounds = offsets.tolist()
    chunks: list[Tensor] = []
    for first, last in chunks_of_users(bounds, q.shape[1]):
        rows = slice(bounds[first], bounds[last])
        arguments = (q[rows], k[rows], v[rows], u[rows], *tables, seconds[rows], offsets[first : last + 1], rows.start)
        if needs_grad:
            chunks.append(checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(run(*arguments))
    return torch.cat(chunks) if chunks else torch.zeros_like(u).flatten(1)


def chunks_of_users(bounds: list[int], heads: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of users that have rows, each with at most CHUNK_SCORES scores in its padded block, or one user.

    bounds: offsets of the users' rows
    """
    first = longest = 0
    for user in range(len(bounds) - 1):
        longer = max(longest, bounds[user + 1] - bounds[user])
        if user > first and (user + 1 - first) * heads * longer**2 > CHUNK_SCORES:
            if longest:
                yield first, user
            first = user
            longer = bounds[user + 1] - bounds[user]
        longest = longer
    if longest:
        yield first, len(bounds) - 1


def _run_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    first_row: int,
    *,
    thresholds: Tensor,
    seed: Tensor | None,
    eps: float,
    max_events: int,
    alpha: float,
    dropout: float,
    num_contextual: int,
) -> Tensor:
    """Return the chunk's rows [rows, heads * d_v] in u's dtype. offsets: in the batch; q, k, v, u, seconds: [rows]"""
    lengths = offsets.diff().long()
    positions = torch.arange(int(lengths.max()), device=q.device)
    valid = positions < lengths[:, None]  # [users, length]
    rows = torch.where(valid, offsets[:-1].long()[:, None] - first_row + positions, 0)
    y = fused_attention_layernorm(
        q[rows].float(),
        k[rows].float(),
        v[rows].float(),
        u[rows].float(),
        seconds[rows].long(),
        lengths,
        position_bias,
        time_bias,
        thresholds,
        norm_weight,
        norm_bias,
        eps,
        max_events,
        alpha,
        num_contextual,
        dropout,
        seed,
        first_row,
    )
    return y[valid].to(u.dtype)
