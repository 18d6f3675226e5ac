"""Attention weights that dropout keeps, in plain torch: a function of (seed, packed row, column, head) alone.

Forward and backward passes draw the same bits whatever their tiles, by Philox4x32, a counter-based generator (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One draw serves eight weights of a row with 16 bits
each: the eight out of 32 columns that one thread holds (plan_kernels.to_fragment_order). kernel.keep_mask is the same
in Triton.
"""

import torch
from torch import Tensor

PHILOX_ROUNDS = 7  # the fewest with which Philox4x32 passes BigCrush, in the paper above
RANDOM_RANGE = 1 << 16  # number of values that the 16 random bits of a weight take
_LOW = 0xFFFFFFFF


def keep_threshold(dropout: float) -> int:
    """Return how many of the RANDOM_RANGE values keep a weight; at least one."""
    return max(1, round((1 - dropout) * RANDOM_RANGE))


def keep_scale(dropout: float) -> float:
    """Return the factor of a kept weight: 1 / (1 - p), with p rounded to 16 bits."""
    return RANDOM_RANGE / keep_threshold(dropout)


def keep_mask(seed: Tensor, row: Tensor, column: Tensor, head: Tensor, dropout: float) -> Tensor:
    """Return bool of the broadcast shape of row, column and head: true where a weight is kept.

    seed: int64 []. row: index in the packed batch; column: index within the user; head: all int64.
    """
    key = seed & _LOW, (seed >> 32) & _LOW
    words = philox(key, row, (column >> 5) * 4 + ((column >> 1) & 3), head, torch.zeros_like(head))
    word = torch.stack(words).gather(0, ((column >> 3) & 3).expand_as(words[0])[None])[0]
    return ((word >> ((column & 1) * 16)) & (RANDOM_RANGE - 1)) < keep_threshold(dropout)


def philox(key: tuple[Tensor, Tensor], *counter: Tensor, rounds: int = PHILOX_ROUNDS) -> tuple[Tensor, ...]:
    """Return four words from a key of two words and a counter of four; all words are 32 bits in int64."""
    k0, k1 = key
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    for _ in range(rounds):
        first = c0 * 0xD2511F53  # may wrap at 64 bits; both halves are still right
        second = c2 * 0xCD9E8D57
        c0 = ((second >> 32) & _LOW) ^ c1 ^ k0
        c1 = second & _LOW
        c2 = ((first >> 32) & _LOW) ^ c3 ^ k1
        c3 = first & _LOW
        k0 = (k0 + 0x9E3779B9) & _LOW
        k1 = (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
