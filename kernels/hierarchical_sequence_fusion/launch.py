"""Launches of the fusion: block sizes and buffers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hierarchical_sequence_fusion import kernel
from kernels.hierarchical_sequence_fusion.reference import max_rows
from kernels.launch import ceil_div, launch, next_power_of_2

# A program is a warp whose lanes use the widest load there is, on every GPU: no table of configurations.
LANES = 32
LANE_BYTES = 16


@dataclass(frozen=True, slots=True)
class EventColumns:
    """Columns of a packed batch.

    tokens: int [events]; feature_ids: int [events, features]; seconds: int32 [events]; offsets: int [users + 1]
    """

    tokens: Tensor
    feature_ids: Tensor
    seconds: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Tables of item and feature embeddings.

    table: [items, width]; features: [feature rows, width]; log_strength: float32 [feature rows]
    """

    table: Tensor
    features: Tensor
    log_strength: Tensor


def can_pack_pairs(rows: Tensor) -> bool:
    """Whether pairs of bfloat16 columns can be read as int32, which saves one shift per value."""
    aligned = rows.data_ptr() % 4 == 0 and rows.shape[1] % 2 == 0 and rows.stride(0) % 2 == 0
    return rows.dtype == torch.bfloat16 and rows.stride(1) == 1 and aligned


def pack_pairs(rows: Tensor) -> Tensor:
    """View bfloat16 [rows, width] as int32 [rows, width / 2]."""
    return rows.view(torch.int32)


def fuse(
    embeddings: Embeddings, events: EventColumns, recent: int, sessions: int, gap_s: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels on checked input of at least one user and one event; the result is that of the reference."""
    device = embeddings.table.device
    width = embeddings.table.shape[1]
    users = len(events.offsets) - 1
    rows = max_rows(len(events.tokens), users, recent, sessions)
    block = min(4096, max(1024, next_power_of_2(len(events.tokens) // users)))  # 4,096 events: 10 us, 1,024 each: 20 us
    starts = torch.empty(users, sessions + 1, dtype=torch.int32, device=device)
    counts = torch.empty(users, dtype=torch.int32, device=device)
    launch(
        kernel.session_kernel, (users,), events.seconds, events.offsets, starts, counts, gap_s,
        RECENT=recent, SESSIONS=sessions, BLOCK=block, num_warps=block // 256,
    )  # fmt: skip
    fused = torch.empty(rows, width, dtype=embeddings.table.dtype, device=device)
    pairs = all(can_pack_pairs(part) for part in (embeddings.table, embeddings.features))
    table, features, out = (
        pack_pairs(part) if pairs else part for part in (embeddings.table, embeddings.features, fused)
    )
    width = out.shape[1]
    seconds = torch.empty(rows, dtype=torch.int32, device=device)
    offsets = torch.empty(users + 1, dtype=torch.int64, device=device)
    block_d = min(LANES * LANE_BYTES // out.element_size(), next_power_of_2(width))
    launch(
        kernel.fuse_kernel, (users * (sessions + recent), ceil_div(width, block_d)),
        table, features, embeddings.log_strength, events.tokens, events.feature_ids, events.seconds, events.offsets,
        starts, counts, out, seconds, offsets, users, rows, width, table.stride(0), features.stride(0),
        RECENT=recent, SESSIONS=sessions, FEATURES=events.feature_ids.shape[1], BLOCK_D=block_d,
        BLOCK_USERS=min(1024, max(16, next_power_of_2(users))), EVEN_D=width % block_d == 0, PAIRS=pairs,
        num_warps=1,
    )  # fmt: skip
    return fused, seconds, offsets
