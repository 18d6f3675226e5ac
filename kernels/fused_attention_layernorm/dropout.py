"""Which attention weights dropout keeps, in plain torch: a function of (seed, packed row, column, head) alone.

Forward and backward passes, whatever their tiles, draw the same bits by Philox4x32, a counter-based generator (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One draw serves eight weights of a row with 16 bits
each: the eight that a thread holds of 32 columns (plan.fragment_order). kernel.is_kept is the same in Triton.
"""

import torch
from torch import Tensor

ROUNDS = 7  # the fewest with which Philox4x32 passes BigCrush, in the paper above
WHOLE = 1 << 16  # a probability of 1
_LOW = 0xFFFFFFFF


def kept_of(dropout: float) -> int:
    """How many of the WHOLE values that 16 bits have keep a weight; at least one."""
    return max(1, round((1 - dropout) * WHOLE))


def weight_of(dropout: float) -> float:
    """What a kept weight counts: 1 / (1 - p), p rounded to 16 bits."""
    return WHOLE / kept_of(dropout)


def is_kept(seed: Tensor, row: Tensor, column: Tensor, head: Tensor, dropout: float) -> Tensor:
    """seed: int64 []; row: index in the packed batch, column: within the user, head: int64, of shapes that broadcast
    -> bool of their shape."""
    low, high = seed & _LOW, (seed >> 32) & _LOW
    words = philox((low, high), row, (column >> 5) * 4 + ((column >> 1) & 3), head, torch.zeros_like(head))
    word = torch.stack(words).gather(0, ((column >> 3) & 3).expand_as(words[0])[None])[0]
    return ((word >> ((column & 1) * 16)) & (WHOLE - 1)) < kept_of(dropout)


def philox(key: tuple[Tensor, Tensor], *counter: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Four words from a key of two and a counter of four, all 32 bits in int64."""
    (k0, k1), (c0, c1, c2, c3) = key, torch.broadcast_tensors(*counter)
    for _ in range(rounds):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits that may wrap: their two halves are right
        c0, c1 = ((second >> 32) & _LOW) ^ c1 ^ k0, second & _LOW
        c2, c3 = ((first >> 32) & _LOW) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
