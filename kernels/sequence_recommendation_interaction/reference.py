"""The specification in naive fp32: every user's scores of the full catalogue, sorted."""

import torch
from torch import Tensor


def sequence_recommendation_interaction(
    states: Tensor,
    table: Tensor,
    k: int,
    seen: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    eligible: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k best rows of `table` per state: scores float32 [users, k], rows int64 [users, k], best first.

    states: [users, width]; table: [items, width], or int8 with `scales` float32 [items], one per row.
    seen: int [n], rows excluded per user, those of user i in seen[seen_offsets[i] : seen_offsets[i + 1]].
    eligible: bool [items], rows that may be returned to any user. Of equal scores the lower row comes first. A score of
    NaN is never returned. If too few items remain, the results end with score -inf and row -1.
    """
    scores = states.float() @ _rows(table, scales).T  # [users, items]
    excluded = scores.isnan()
    if eligible is not None:
        excluded |= ~eligible
    if seen is not None and seen_offsets is not None:
        owners = torch.arange(len(states), device=seen.device).repeat_interleave(seen_offsets.diff())
        excluded[owners, seen.long()] = True
    best, rows = scores.masked_fill(excluded, -torch.inf).sort(dim=1, descending=True, stable=True)
    best = best[:, :k]
    rows = rows[:, :k]
    missing = k - best.shape[1]
    best = torch.nn.functional.pad(best, (0, missing), value=-torch.inf)
    rows = torch.nn.functional.pad(rows, (0, missing), value=-1)
    return best, rows.masked_fill(best == -torch.inf, -1)


def candidate_interaction(states: Tensor, table: Tensor, rows: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return scores float32 [users, candidates] of each user's rows: int [users, candidates], -1 for none (-inf)."""
    items = _rows(table, scales)[rows.clamp(min=0).long()]  # [users, candidates, width]
    scores = torch.einsum("uw,ucw->uc", states.float(), items)
    return scores.masked_fill(rows < 0, -torch.inf)


def _rows(table: Tensor, scales: Tensor | None) -> Tensor:
    return table.float() if scales is None else table.float() * scales[:, None]
