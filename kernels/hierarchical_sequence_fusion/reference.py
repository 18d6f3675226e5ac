"""The specification: one user after the other, one session after the other, naive, in fp32."""

from itertools import pairwise

import torch
from torch import Tensor

STRENGTH_CAP = 20.0  # e^-20 to e^20: the sum of a million weights is a float32, and none is lost to zero


def hierarchical_sequence_fusion(
    table: Tensor,
    features: Tensor,
    strength: Tensor,
    tokens: Tensor,
    codes: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    recent: int,
    sessions: int,
    gap_s: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each user's newest `recent` events as they are, and one vector for each of the newest `sessions` before them.

    An event's item is table[tokens[i]], its features are the sum of features[codes[i, j]] over j, its strength exp of
    the sum of strength[codes[i, j]], that sum between -20 and 20. One of the newest is strength * item + features. A
    session ends before an event that comes `gap_s` or more after its predecessor, or that is one of the newest; its
    vector is the mean of item + features over its events, weighted by their strengths, its time the last's.

    Returns fused [rows, width] of the table's dtype, seconds int32 [rows], offsets int64 [users + 1]: packed, each user
    oldest first. rows = min(events, users * (recent + sessions)); those from offsets[-1] on are zero.
    """
    users, rows = len(offsets) - 1, row_bound(len(tokens), len(offsets) - 1, recent, sessions)
    fused = torch.zeros(rows, table.shape[1], dtype=table.dtype, device=table.device)
    times, ends = torch.zeros(rows, dtype=torch.int32, device=table.device), [0]
    items, beside = table.float()[tokens.long()], features.float()[codes.long()].sum(1)  # [events, width] both
    powers = strength.float()[codes.long()].sum(1, keepdim=True)  # [events, 1]
    weights = powers.clamp(-STRENGTH_CAP, STRENGTH_CAP).exp()
    for user in range(users):
        row, older = ends[-1], int(offsets[user + 1]) - recent
        for start, stop in _spans(seconds, int(offsets[user]), int(offsets[user + 1]), recent, sessions, gap_s):
            item, feature, weight = (part[start:stop] for part in (items, beside, weights))
            if start >= older:
                vector = weight[0] * item[0] + feature[0]
            elif stop - start == 1:
                vector = item[0] + feature[0]
            else:
                vector = ((item + feature) * weight).sum(0) / weight.sum()
            fused[row], times[row] = vector.to(table.dtype), seconds[stop - 1]
            row += 1
        ends.append(row)
    return fused, times, torch.tensor(ends, device=table.device)


def row_bound(events: int, users: int, recent: int, sessions: int) -> int:
    """So many rows suffice for any offsets and times."""
    return min(events, users * (recent + sessions))


def _spans(seconds: Tensor, start: int, stop: int, recent: int, sessions: int, gap_s: int) -> list[tuple[int, int]]:
    """The events of each token of one user, oldest first."""
    older = max(start, stop - recent)
    begins = [i for i in range(start, older) if i == start or int(seconds[i]) - int(seconds[i - 1]) >= gap_s]
    pooled = list(pairwise([*begins, older]))
    return pooled[max(0, len(pooled) - sessions) :] + [(i, i + 1) for i in range(older, stop)]
