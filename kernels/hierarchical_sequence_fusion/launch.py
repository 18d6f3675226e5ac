"""Launches of the fusion: the tiles, the buffers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hierarchical_sequence_fusion import kernel
from kernels.hierarchical_sequence_fusion.reference import row_bound
from kernels.launch import ceil_div, launch, next_power_of_2

LANES, LANE_BYTES = 32, 16  # a program is a warp, and a load the widest there is, on every card: no table of launches


@dataclass(frozen=True, slots=True)
class EventColumns:
    """tokens: int [events]; codes: int [events, features]; seconds: int32 [events]; offsets: int [users + 1]."""

    tokens: Tensor
    codes: Tensor
    seconds: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class Embeddings:
    """table: [items, width]; features: [feature rows, width]; strength: float32 [feature rows]."""

    table: Tensor
    features: Tensor
    strength: Tensor


def in_words(rows: Tensor) -> bool:
    """Whether pairs of bfloat16 columns can be read as int32, which spares a shift a value."""
    aligned = rows.data_ptr() % 4 == 0 and rows.shape[1] % 2 == 0 and rows.stride(0) % 2 == 0
    return rows.dtype == torch.bfloat16 and rows.stride(1) == 1 and aligned


def as_words(rows: Tensor) -> Tensor:
    """[rows, width] -> int32 [rows, width / 2], of the same memory."""
    return rows.view(torch.int32)


def fuse(
    embeddings: Embeddings, events: EventColumns, recent: int, sessions: int, gap_s: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches on checked input of at least one user and one event."""
    table, device, width = embeddings.table, embeddings.table.device, embeddings.table.shape[1]
    users = len(events.offsets) - 1
    rows = row_bound(len(events.tokens), users, recent, sessions)
    look = min(4096, max(1024, next_power_of_2(len(events.tokens) // users)))  # 4,096 events: 10 us, 1,024 at a time 20
    starts = torch.empty(users, sessions + 1, dtype=torch.int32, device=device)
    counts = torch.empty(users, dtype=torch.int32, device=device)
    launch(
        kernel.span_kernel, (users,), events.seconds, events.offsets, starts, counts, gap_s,
        RECENT=recent, SESSIONS=sessions, BLOCK=look, num_warps=look // 256,
    )  # fmt: skip
    fused = torch.empty(rows, width, dtype=table.dtype, device=device)
    words = all(in_words(part) for part in (table, embeddings.features))
    read, features, written = (as_words(part) if words else part for part in (table, embeddings.features, fused))
    width = written.shape[1]
    seconds = torch.empty(rows, dtype=torch.int32, device=device)
    offsets = torch.empty(users + 1, dtype=torch.int64, device=device)
    columns = min(LANES * LANE_BYTES // written.element_size(), next_power_of_2(width))
    launch(
        kernel.fuse_kernel, (users * (sessions + recent), ceil_div(width, columns)),
        read, features, embeddings.strength, events.tokens, events.codes, events.seconds, events.offsets,
        starts, counts, written, seconds, offsets, users, rows, width, read.stride(0), features.stride(0),
        RECENT=recent, SESSIONS=sessions, FEATURES=events.codes.shape[1], BLOCK_WIDTH=columns,
        BLOCK_USERS=min(1024, max(16, next_power_of_2(users))), EVEN=width % columns == 0, WORDS=words,
        num_warps=1,
    )  # fmt: skip
    return fused, seconds, offsets
