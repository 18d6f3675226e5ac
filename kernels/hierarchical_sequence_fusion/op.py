"""The checked call: shapes at the door, Triton on a GPU, the specification elsewhere. For inference: no gradients."""

from typing import Any

import torch
from torch import Tensor

from kernels.hierarchical_sequence_fusion import reference
from kernels.validation import FLOATS, INTEGERS, MAX_ROWS, offset_faults, require, require_values

MAX_FEATURES = 32
MAX_TOKENS = 1 << 16  # of a user


def hierarchical_sequence_fusion(
    table: Tensor,
    features: Tensor,
    strength: Tensor,
    tokens: Tensor,
    codes: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    *,
    recent: int,
    sessions: int,
    gap_s: int,
    check_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each user's newest `recent` events as they are, and one vector for each of the newest `sessions` before them.

    table: [items, width], float32, bfloat16 or float16; rows of the whole table, or of a cache: tokens are its slots
    then. features: [feature rows, width] of the same dtype; strength: float32 [feature rows], log weights.
    tokens: int32 or int64 [events]; codes: int32 or int64 [events, features], rows of `features`: action, time,
    strength and position of an event alike; seconds: int32 [events], ascending a user; offsets: int32 or int64
    [users + 1]. These four are the columns of pipeline.features.Inputs.
    An event's strength is exp of the sum of its log weights, cut to -20 and 20. One of the newest events is its item's
    row times its strength, + its features' rows. A session ends before a pause of `gap_s` or more, and before the
    newest events; its vector is the mean of its events' items' + features' rows, weighted by their strengths, its time
    that of the last. Sums are float32.

    Returns fused [rows, width] of the table's dtype, seconds int32 [rows], offsets int64 [users + 1]. rows =
    min(events, users * (recent + sessions)), whatever the values are; rows from offsets[-1] on are zero.
    `check_values` waits for the device to look at the values of all but the table, whose NaN stay in the rows of their
    items; leave it out in graph capture and where the caller has checked them. Raises ValueError that names the
    argument. No sum is atomic: equal inputs give equal bits.
    """
    device = table.device
    require(table.dtype in FLOATS and table.dim() == 2 and table.stride(1) == 1,
            "table", table, "float32, bfloat16 or float16 [items, width], rows of adjacent elements")  # fmt: skip
    require(table.shape[0] > 0, "table", table, "an item at least")
    require(tokens.dtype in INTEGERS and tokens.dim() == 1 and tokens.device == device,
            "tokens", tokens, f"int32 or int64 [events] on {device}")  # fmt: skip
    width, events = table.shape[1], tokens.shape[0]
    require(features.dtype == table.dtype and features.dim() == 2 and features.shape[1] == width and
            features.device == device,
            "features", features, f"{table.dtype} [feature rows, {width}] on {device}")  # fmt: skip
    require(strength.dtype == torch.float32 and strength.shape == (features.shape[0],) and strength.device == device,
            "strength", strength, f"torch.float32 [{features.shape[0]}] on {device}")  # fmt: skip
    require(codes.dtype in INTEGERS and codes.dim() == 2 and codes.shape[0] == events and codes.device == device and
            codes.shape[1] <= MAX_FEATURES,
            "codes", codes, f"int32 or int64 [{events}, up to {MAX_FEATURES}] on {device}")  # fmt: skip
    require(seconds.dtype == torch.int32 and seconds.shape == (events,) and seconds.device == device,
            "seconds", seconds, f"torch.int32 [{events}] on {device}")  # fmt: skip
    require(offsets.dtype in INTEGERS and offsets.dim() == 1 and offsets.shape[0] > 0 and offsets.device == device,
            "offsets", offsets, f"int32 or int64 [users + 1] on {device}")  # fmt: skip
    if recent < 0 or sessions < 0 or not 0 < recent + sessions <= MAX_TOKENS or gap_s < 1:
        raise ValueError(f"recent = {recent}, sessions = {sessions}, gap_s = {gap_s}: "
                         f"wanted 1 to {MAX_TOKENS} tokens a user together, and a pause of at least 1 s")  # fmt: skip
    if (offsets.shape[0] - 1) * (recent + sessions) > MAX_ROWS:
        raise ValueError(f"{offsets.shape[0] - 1} users of up to {recent + sessions} tokens each: wanted at most "
                         f"{MAX_ROWS} tokens in a call; give it fewer users")  # fmt: skip
    if check_values and not torch.compiler.is_compiling():
        _check_values(table.shape[0], features, strength, tokens, codes, offsets)
    return _fuse(table, features, strength, tokens, codes, seconds, offsets, recent, sessions, gap_s)


def _check_values(
    items: int, features: Tensor, strength: Tensor, tokens: Tensor, codes: Tensor, offsets: Tensor
) -> None:
    too_many = {f"must end with at most {MAX_ROWS} events": offsets[-1] > MAX_ROWS}
    require_values("offsets", offsets, offset_faults(offsets, tokens.shape[0]) | too_many)
    for name, part in (("features", features), ("strength", strength)):
        require_values(name, part, {"must be finite": ~part.isfinite().all()})
    for name, index, end in (("tokens", tokens, items), ("codes", codes, len(features))):
        require_values(name, index, {f"must be from 0 to {end - 1}": ((index < 0) | (index >= end)).any()})


@torch.library.custom_op("millrace::hierarchical_sequence_fusion", mutates_args=())
def _fuse(
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
    if not table.is_cuda or tokens.shape[0] == 0:
        return reference.hierarchical_sequence_fusion(
            table, features, strength, tokens, codes, seconds, offsets, recent, sessions, gap_s
        )
    from kernels.hierarchical_sequence_fusion import launch

    features = features if features.stride(1) == 1 else features.contiguous()
    embeddings = launch.Embeddings(table, features, strength.contiguous())
    events = launch.EventColumns(tokens.contiguous(), codes.contiguous(), seconds.contiguous(), offsets.contiguous())
    return launch.fuse(embeddings, events, recent, sessions, gap_s)


@_fuse.register_fake
def _(
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
    users = offsets.shape[0] - 1
    rows: Any = torch.sym_min(tokens.shape[0], users * (recent + sessions))
    times = seconds.new_empty((rows,), dtype=torch.int32)
    return table.new_empty((rows, table.shape[1])), times, offsets.new_empty((users + 1,), dtype=torch.int64)
