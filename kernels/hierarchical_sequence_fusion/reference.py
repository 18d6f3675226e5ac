"""The specification in naive fp32: a loop over users and their sessions."""

from itertools import pairwise

import torch
from torch import Tensor

STRENGTH_CAP = 20.0  # e^-20 to e^20: the sum of a million weights fits a float32, and none is lost to zero


def hierarchical_sequence_fusion(
    table: Tensor,
    features: Tensor,
    log_strength: Tensor,
    tokens: Tensor,
    feature_ids: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    recent: int,
    sessions: int,
    gap_s: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one vector per event for each user's last `recent` events, and one per session for the last `sessions`
    sessions before them.

    An event's item is table[tokens[i]], its features are the sum of features[feature_ids[i, j]] over j, its strength
    exp of the sum of log_strength[feature_ids[i, j]], that sum clamped to -20 and 20. A recent event's vector is
    strength * item + features. A session ends before an event that follows its predecessor by `gap_s` or more, or that
    is recent; its vector is the mean of item + features over its events, weighted by their strengths, its time that of
    its last event.

    Returns fused [rows, width] of the table's dtype, seconds int32 [rows], offsets int64 [users + 1]: packed, each user
    oldest first. rows = min(events, users * (recent + sessions)); those from offsets[-1] on are zero.
    """
    users = len(offsets) - 1
    rows = max_rows(len(tokens), users, recent, sessions)
    fused = torch.zeros(rows, table.shape[1], dtype=table.dtype, device=table.device)
    fused_seconds = torch.zeros(rows, dtype=torch.int32, device=table.device)
    ends = [0]
    items = table.float()[tokens.long()]  # [events, width]
    feature_sums = features.float()[feature_ids.long()].sum(1)  # [events, width]
    log_strengths = log_strength.float()[feature_ids.long()].sum(1, keepdim=True)  # [events, 1]
    strengths = log_strengths.clamp(-STRENGTH_CAP, STRENGTH_CAP).exp()
    for user in range(users):
        row = ends[-1]
        recent_start = int(offsets[user + 1]) - recent
        for start, stop in _spans(seconds, int(offsets[user]), int(offsets[user + 1]), recent, sessions, gap_s):
            item, feature, strength = (part[start:stop] for part in (items, feature_sums, strengths))
            if start >= recent_start:
                vector = strength[0] * item[0] + feature[0]
            elif stop - start == 1:
                vector = item[0] + feature[0]
            else:
                vector = ((item + feature) * strength).sum(0) / strength.sum()
            fused[row] = vector.to(table.dtype)
            fused_seconds[row] = seconds[stop - 1]
            row += 1
        ends.append(row)
    return fused, fused_seconds, torch.tensor(ends, device=table.device)


def max_rows(events: int, users: int, recent: int, sessions: int) -> int:
    """Return an upper bound of the fused rows, whatever the offsets and times are."""
    return min(events, users * (recent + sessions))


def _spans(seconds: Tensor, start: int, stop: int, recent: int, sessions: int, gap_s: int) -> list[tuple[int, int]]:
    """Return the range of events of each fused row of one user, oldest first."""
    recent_start = max(start, stop - recent)
    session_starts = [
        i for i in range(start, recent_start) if i == start or int(seconds[i]) - int(seconds[i - 1]) >= gap_s
    ]
    pooled = list(pairwise([*session_starts, recent_start]))
    return pooled[max(0, len(pooled) - sessions) :] + [(i, i + 1) for i in range(recent_start, stop)]
