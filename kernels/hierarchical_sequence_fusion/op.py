"""The public call: checks arguments, runs Triton on a GPU and the specification elsewhere. For inference only."""

from typing import Any

import torch
from torch import Tensor

from kernels.hierarchical_sequence_fusion import reference
from kernels.validation import FLOAT_DTYPES, INT_DTYPES, MAX_ROWS, offset_faults, require, require_values

MAX_FEATURES = 32
MAX_ROWS_PER_USER = 1 << 16


def hierarchical_sequence_fusion(
    table: Tensor,
    features: Tensor,
    log_strength: Tensor,
    tokens: Tensor,
    feature_ids: Tensor,
    seconds: Tensor,
    offsets: Tensor,
    *,
    recent: int,
    sessions: int,
    gap_s: int,
    check_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one vector per event for each user's last `recent` events, and one per session for the last `sessions`
    sessions before them.

    table: [items, width], float32, bfloat16 or float16; rows of the full table, or of a cache: then tokens are its
    slots. features: [feature rows, width] of the same dtype; log_strength: float32 [feature rows].
    tokens: int32 or int64 [events]; feature_ids: int32 or int64 [events, features], rows of `features` for an
    event's action, time, strength and position; seconds: int32 [events], ascending within a user; offsets: int32 or
    int64 [users + 1]. These four are the columns of pipeline.features.event_features.EncoderInputs.
    An event's strength is exp of its summed log strengths, clamped to -20 and 20. A recent event's vector is its
    item's row times its strength, plus its features' rows. A session ends before a pause of `gap_s` or more, and before
    the recent events; its vector is the mean of its events' items' + features' rows, weighted by their strengths, its
    time that of the last event. Sums are float32.

    Returns fused [rows, width] of the table's dtype, seconds int32 [rows], offsets int64 [users + 1]. rows =
    min(events, users * (recent + sessions)), whatever the values are; rows from offsets[-1] on are zero.
    `check_values` waits for the device to check the values of everything but the table, whose NaN stay in the rows of
    their items; disable it in graph capture, or if the caller has checked them. Raises ValueError that names the
    argument. No sum is atomic: equal inputs give equal bits.
    """
    _check_embeddings(table, features, log_strength)
    _check_events(tokens, feature_ids, seconds, offsets, table.device)
    users = offsets.shape[0] - 1
    if recent < 0 or sessions < 0 or not 0 < recent + sessions <= MAX_ROWS_PER_USER or gap_s < 1:
        raise ValueError(
            f"recent = {recent}, sessions = {sessions}, gap_s = {gap_s}: "
            f"expected 1 to {MAX_ROWS_PER_USER} recent events and sessions per user, and a pause of at least 1 s"
        )
    if users * (recent + sessions) > MAX_ROWS:
        raise ValueError(
            f"{users} users of up to {recent + sessions} rows each: expected at most {MAX_ROWS} rows per call; "
            "split the users over several calls"
        )
    if check_values and not torch.compiler.is_compiling():
        _check_values(table.shape[0], features, log_strength, tokens, feature_ids, offsets)
    return _fuse(table, features, log_strength, tokens, feature_ids, seconds, offsets, recent, sessions, gap_s)


def _check_embeddings(table: Tensor, features: Tensor, log_strength: Tensor) -> None:
    device = table.device
    require(
        table.dtype in FLOAT_DTYPES and table.dim() == 2 and table.stride(1) == 1,
        "table",
        table,
        "float32, bfloat16 or float16 [items, width], rows of adjacent elements",
    )
    require(table.shape[0] > 0, "table", table, "at least one item")
    width = table.shape[1]
    require(
        features.dtype == table.dtype
        and features.dim() == 2
        and features.shape[1] == width
        and features.device == device,
        "features",
        features,
        f"{table.dtype} [feature rows, {width}] on {device}",
    )
    require(
        log_strength.dtype == torch.float32
        and log_strength.shape == (features.shape[0],)
        and log_strength.device == device,
        "log_strength",
        log_strength,
        f"torch.float32 [{features.shape[0]}] on {device}",
    )


def _check_events(tokens: Tensor, feature_ids: Tensor, seconds: Tensor, offsets: Tensor, device: torch.device) -> None:
    require(
        tokens.dtype in INT_DTYPES and tokens.dim() == 1 and tokens.device == device,
        "tokens",
        tokens,
        f"int32 or int64 [events] on {device}",
    )
    events = tokens.shape[0]
    require(
        feature_ids.dtype in INT_DTYPES
        and feature_ids.dim() == 2
        and feature_ids.shape[0] == events
        and feature_ids.device == device
        and feature_ids.shape[1] <= MAX_FEATURES,
        "feature_ids",
        feature_ids,
        f"int32 or int64 [{events}, up to {MAX_FEATURES}] on {device}",
    )
    require(
        seconds.dtype == torch.int32 and seconds.shape == (events,) and seconds.device == device,
        "seconds",
        seconds,
        f"torch.int32 [{events}] on {device}",
    )
    require(
        offsets.dtype in INT_DTYPES and offsets.dim() == 1 and offsets.shape[0] > 0 and offsets.device == device,
        "offsets",
        offsets,
        f"int32 or int64 [users + 1] on {device}",
    )


def _check_values(
    items: int, features: Tensor, log_strength: Tensor, tokens: Tensor, feature_ids: Tensor, offsets: Tensor
) -> None:
    too_many = {f"must end with at most {MAX_ROWS} events": offsets[-1] > MAX_ROWS}
    require_values("offsets", offsets, offset_faults(offsets, tokens.shape[0]) | too_many)
    for name, part in (("features", features), ("log_strength", log_strength)):
        require_values(name, part, {"must be finite": ~part.isfinite().all()})
    for name, index, end in (("tokens", tokens, items), ("feature_ids", feature_ids, len(features))):
        require_values(name, index, {f"must be from 0 to {end - 1}": ((index < 0) | (index >= end)).any()})


@torch.library.custom_op("millrace::hierarchical_sequence_fusion", mutates_args=())
def _fuse(
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
    if not table.is_cuda or tokens.shape[0] == 0:
        return reference.hierarchical_sequence_fusion(
            table, features, log_strength, tokens, feature_ids, seconds, offsets, recent, sessions, gap_s
        )
    from kernels.hierarchical_sequence_fusion import launch

    features = features if features.stride(1) == 1 else features.contiguous()
    embeddings = launch.Embeddings(table, features, log_strength.contiguous())
    events = launch.EventColumns(
        tokens.contiguous(), feature_ids.contiguous(), seconds.contiguous(), offsets.contiguous()
    )
    return launch.fuse(embeddings, events, recent, sessions, gap_s)


@_fuse.register_fake
def _(
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
    users = offsets.shape[0] - 1
    rows: Any = torch.sym_min(tokens.shape[0], users * (recent + sessions))
    fused_seconds = seconds.new_empty((rows,), dtype=torch.int32)
    return table.new_empty((rows, table.shape[1])), fused_seconds, offsets.new_empty((users + 1,), dtype=torch.int64)
