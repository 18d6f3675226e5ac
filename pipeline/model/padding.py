"""Packed users as padded blocks, for attention in torch: little padding, and no loop over users.

Users of similar lengths share a block. Rows are padded on the right, so a causal query never sees a padded key.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.features.event_features import SECONDS_CAP, EncoderInputs
from pipeline.tensors import to_device


class BlockPolicy(NamedTuple):
    """Rules for grouping users into blocks.

    max_scores: a block of length L holds max_scores / L^2 users
    dense_rows: a length with at least this many rows gets its own block, without padding
    growth: the lengths in any other block differ by at most this factor (or 4 rows)
    """

    max_scores: int
    dense_rows: int
    growth: float


CPU_POLICY = BlockPolicy(1 << 17, 256, 1.25)  # 128 k scores of two heads are 1 MiB: a core's cache
# A kernel's launch costs more than padding: a training step of 2,048 events 21 ms, with CPU_POLICY 30 ms (an H100).
GPU_POLICY = BlockPolicy(1 << 24, 1 << 62, 4.0)

BiasIndex = tuple[Tensor, Tensor, Tensor]  # distances, time buckets, causal mask


@dataclass(slots=True)
class Block:
    """Users of similar lengths.

    users: int64 [users], their numbers in the batch
    rows: int64 [users, length], each slot's packed row; slots after a user's end repeat its last row
    ends: int64 [users], the slot of each user's last row
    seconds: int32 [users, length]
    dense_from: the first packed row, if the users follow each other there and have one length: a view is enough
    """

    users: Tensor
    rows: Tensor
    ends: Tensor
    seconds: Tensor
    dense_from: int | None = None
    _bias_index: BiasIndex | None = None
    _last_bias_index: BiasIndex | None = None

    def pad(self, packed: Tensor) -> Tensor:
        """Return packed rows [total, d] as [users, length, d]."""
        if self.dense_from is not None:
            return packed[self.dense_from : self.dense_from + self.rows.numel()].view(*self.rows.shape, -1)
        return packed.index_select(0, self.rows.view(-1)).view(*self.rows.shape, -1)

    @property
    def bias_index(self) -> BiasIndex:
        """Index of the biases from every slot to every slot.

        Distances int64 [1, length, length], time buckets int64 [users, length, length], causal mask float32 [length,
        length].
        """
        if self._bias_index is None:
            slots = torch.arange(self.rows.shape[1], device=self.rows.device)
            distances = slots[:, None] - slots
            mask = (distances >= 0).float()
            elapsed = self.seconds[:, :, None] - self.seconds[:, None, :]
            self._bias_index = distances.clamp_(min=0)[None], time_buckets(elapsed), mask
        return self._bias_index

    @property
    def last_bias_index(self) -> BiasIndex:
        """Index of the biases from each user's last row to its slots.

        Distances and time buckets int64 [users, 1, length], mask float32 of that shape.
        """
        if self._last_bias_index is None:
            slots = torch.arange(self.rows.shape[1], device=self.rows.device)
            distances = (self.ends[:, None] - slots)[:, None]
            mask = (distances >= 0).float()
            elapsed = (self.seconds[:, -1:] - self.seconds)[:, None]
            self._last_bias_index = distances.clamp_(min=0), time_buckets(elapsed), mask
        return self._last_bias_index


@dataclass(slots=True)
class PaddedBlocks:
    """The blocks of one packed batch.

    slots: int64 [total], each packed row's index in the blocks' concatenated slots; None: the identity (all are dense)
    last: int64 [users], each user's last packed row
    last_slots: int64 [users], each user's index in the blocks' concatenated users; None: the identity
    """

    blocks: list[Block]
    slots: Tensor | None
    last: Tensor
    last_slots: Tensor | None

    @classmethod
    def from_inputs(
        cls, inputs: EncoderInputs, device: torch.device | str = "cpu", policy: BlockPolicy | None = None
    ) -> "PaddedBlocks":
        """Return the blocks of users who all have events; fastest for users in ascending order of length.

        policy: None takes the device's
        """
        policy = policy or (CPU_POLICY if torch.device(device).type == "cpu" else GPU_POLICY)
        offsets = inputs.offsets
        lengths = np.diff(offsets)
        order = np.argsort(lengths, kind="stable")
        slots = np.empty(int(offsets[-1]), np.int64)
        n_slots = 0
        blocks = []
        for start, stop in _block_bounds(lengths[order], policy):
            users = order[start:stop]
            column = np.arange(int(lengths[users[-1]]))
            rows = offsets[users, None] + np.minimum(column, lengths[users, None] - 1)  # [users, length]
            is_real = column < lengths[users, None]
            slots[rows[is_real]] = n_slots + np.flatnonzero(is_real)
            n_slots += rows.size
            blocks.append(_make_block(users, rows, lengths[users], inputs.seconds, device))
        last_slots = np.empty(len(order), np.int64)
        last_slots[order] = np.arange(len(order))
        last = to_device(offsets[1:] - 1, device)
        return cls(blocks, _index_or_none(slots, device), last, _index_or_none(last_slots, device))

    def pack(self, blocks: list[Tensor], last: bool) -> Tensor:
        """Return the blocks' [users, slots, d] as [total, d]; with `last`, one query per user, as [users, d]."""
        flat = torch.cat([block.flatten(0, 1) for block in blocks])
        index = self.last_slots if last else self.slots
        return flat if index is None else flat.index_select(0, index)


def time_buckets(elapsed: Tensor) -> Tensor:
    """Return int64 buckets of int32 seconds, exactly features.bucket_seconds; negative ones (masked) become bucket 0.

    int64 because the gradient of a lookup by int32 takes 30 times longer (index_add of 262 k cells: 14.5 ms, 0.4 ms).
    """
    capped = elapsed.clamp(0, SECONDS_CAP).add_(1)
    return capped.float().view(torch.int32).bitwise_right_shift_(22).sub_(254).long()


def _make_block(
    users: np.ndarray, rows: np.ndarray, lengths: np.ndarray, seconds: np.ndarray, device: torch.device | str
) -> Block:
    first = int(rows[0, 0])
    is_dense = rows[-1, -1] - first + 1 == rows.size and lengths[0] == lengths[-1] and (np.diff(users) > 0).all()
    columns = [to_device(column, device) for column in (users, rows, lengths - 1, seconds[rows])]
    return Block(*columns, dense_from=first if is_dense else None)


def _index_or_none(index: np.ndarray, device: torch.device | str) -> Tensor | None:
    """Return the index on the device, None for the identity."""
    if (index == np.arange(len(index))).all():
        return None
    return to_device(index, device)


def _block_bounds(lengths: np.ndarray, policy: BlockPolicy) -> list[tuple[int, int]]:
    """Return the ranges of ascending lengths that form a block each."""
    bounds = []
    start = 0
    while start < len(lengths):
        shortest = int(lengths[start])
        limit = int(np.searchsorted(lengths, shortest, side="right"))
        if (limit - start) * shortest < policy.dense_rows:
            limit = int(np.searchsorted(lengths, max(shortest * policy.growth, shortest + 4), side="right"))
        stop = min(limit, start + max(1, policy.max_scores // int(lengths[limit - 1]) ** 2))
        bounds.append((start, stop))
        start = stop
    return bounds
