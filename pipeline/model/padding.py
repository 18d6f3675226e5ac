"""Packed users as padded blocks: what attention needs, without much padding and without a loop over users.

Users of like lengths share a block. Rows are padded on the right, so a causal query never meets a padded key.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.features.event_features import SECONDS_CAP, EncoderInputs


class BlockPolicy(NamedTuple):
    """scores: a block of length L holds scores / L^2 users; dense_rows: a length with as many rows gets its own block,
    without padding; growth: other lengths of one block differ by at most this factor (or 4 rows)."""

    scores: int
    dense_rows: int
    growth: float


CPU_POLICY = BlockPolicy(1 << 17, 256, 1.25)  # 128 k scores of two heads are 1 MiB: a core's cache
# A kernel's launch costs more than padding: a training step of 2,048 events 21 ms, with CORE 30 ms (an H100).
GPU_POLICY = BlockPolicy(1 << 24, 1 << 62, 4.0)

BiasIndex = tuple[Tensor, Tensor, Tensor]


@dataclass(slots=True)
class Block:
    """Users of like lengths.

    users: int64 [users], their numbers in the batch
    rows: int64 [users, length], each slot's packed row; slots beyond a user's end repeat its last row
    ends: int64 [users], the slot of each user's last row
    seconds: int32 [users, length]
    dense_from: the first packed row if the users lie there one after the other, all of one length: a view pads them
    """

    users: Tensor
    rows: Tensor
    ends: Tensor
    seconds: Tensor
    dense_from: int | None = None
    _relations: BiasIndex | None = None
    _last_relations: BiasIndex | None = None

    def pad(self, packed: Tensor) -> Tensor:
        """[total, d] -> [users, length, d]"""
        if self.dense_from is not None:
            return packed[self.dense_from : self.dense_from + self.rows.numel()].view(*self.rows.shape, -1)
        return packed.index_select(0, self.rows.view(-1)).view(*self.rows.shape, -1)

    @property
    def bias_index(self) -> BiasIndex:
        """Of every slot to every slot: distances int64 [1, length, length], time buckets int64 [users, length, length],
        causal mask float32 [length, length]."""
        if self._relations is None:
            slots = torch.arange(self.rows.shape[1], device=self.rows.device)
            distances = slots[:, None] - slots
            mask = (distances >= 0).float()
            elapsed = self.seconds[:, :, None] - self.seconds[:, None, :]
            self._relations = distances.clamp_(min=0)[None], time_buckets(elapsed), mask
        return self._relations

    @property
    def last_bias_index(self) -> BiasIndex:
        """Of each user's last row to its slots: int64 and int64 [users, 1, length], and the mask alike."""
        if self._last_relations is None:
            slots = torch.arange(self.rows.shape[1], device=self.rows.device)
            distances = (self.ends[:, None] - slots)[:, None]
            mask = (distances >= 0).float()
            elapsed = (self.seconds[:, -1:] - self.seconds)[:, None]
            self._last_relations = distances.clamp_(min=0), time_buckets(elapsed), mask
        return self._last_relations


@dataclass(slots=True)
class PaddedBlocks:
    """The blocks of one packed batch.

    slots: int64 [total], each packed row's place in the blocks' concatenated slots; None: its own (all blocks dense)
    last: int64 [users], each user's last packed row
    last_slots: int64 [users], each user's place in the blocks' concatenated users; None: its own
    """

    blocks: list[Block]
    slots: Tensor | None
    last: Tensor
    last_slots: Tensor | None

    @classmethod
    def from_inputs(
        cls, inputs: EncoderInputs, device: torch.device | str = "cpu", policy: BlockPolicy | None = None
    ) -> "PaddedBlocks":
        """Of users who all have at least one event. It is fastest for users in ascending order of length.

        tiling: None takes the device's
        """
        policy = policy or (CPU_POLICY if torch.device(device).type == "cpu" else GPU_POLICY)
        offsets, lengths = inputs.offsets, np.diff(inputs.offsets)
        order = np.argsort(lengths, kind="stable")
        slots, places, taken = np.empty(int(offsets[-1]), np.int64), np.empty(len(order), np.int64), 0
        blocks = []
        for start, stop in _cuts(lengths[order], policy):
            users = order[start:stop]
            column = np.arange(int(lengths[users[-1]]))
            rows = offsets[users, None] + np.minimum(column, lengths[users, None] - 1)  # [users, length]
            own = column < lengths[users, None]
            slots[rows[own]] = taken + np.flatnonzero(own)
            taken += rows.size
            blocks.append(_block(users, rows, lengths[users], inputs.seconds, device))
        places[order] = np.arange(len(order))
        last = torch.from_numpy(offsets[1:] - 1).to(device)
        return cls(blocks, _unless_identity(slots, device), last, _unless_identity(places, device))

    def pack(self, blocks: list[Tensor], last: bool) -> Tensor:
        """The blocks' [users, slots, d] -> [total, d], or of each user's one query -> [users, d]."""
        flat = torch.cat([block.flatten(0, 1) for block in blocks])
        places = self.last_slots if last else self.slots
        return flat if places is None else flat.index_select(0, places)


def time_buckets(elapsed: Tensor) -> Tensor:
    """int32 seconds -> int64 buckets, exactly features.bucket_seconds; negative ones (masked pairs) become bucket 0.

    int64 because the gradient of a lookup by int32 takes 30 times longer (index_add of 262 k cells: 14.5 ms, 0.4 ms).
    """
    capped = elapsed.clamp(0, SECONDS_CAP).add_(1)
    return capped.float().view(torch.int32).bitwise_right_shift_(22).sub_(254).long()


def _block(users: np.ndarray, rows: np.ndarray, lengths: np.ndarray, seconds: np.ndarray,
           device: torch.device | str) -> Block:  # fmt: skip
    first = int(rows[0, 0])
    dense = rows[-1, -1] - first + 1 == rows.size and lengths[0] == lengths[-1] and (np.diff(users) > 0).all()
    columns = [torch.from_numpy(column).to(device) for column in (users, rows, lengths - 1, seconds[rows])]
    return Block(columns[0], columns[1], columns[2], columns[3], first if dense else None)


def _unless_identity(places: np.ndarray, device: torch.device | str) -> Tensor | None:
    if (places == np.arange(len(places))).all():
        return None
    return torch.from_numpy(places).to(device)


def _cuts(lengths: np.ndarray, tiling: BlockPolicy) -> list[tuple[int, int]]:
    """Ranges of ascending lengths that make a block each."""
    cuts, start = [], 0
    while start < len(lengths):
        shortest = int(lengths[start])
        reach = int(np.searchsorted(lengths, shortest, side="right"))
        if (reach - start) * shortest < tiling.dense_rows:
            reach = int(np.searchsorted(lengths, max(shortest * tiling.growth, shortest + 4), side="right"))
        stop = min(reach, start + max(1, tiling.scores // int(lengths[reach - 1]) ** 2))
        cuts.append((start, stop))
        start = stop
    return cuts
