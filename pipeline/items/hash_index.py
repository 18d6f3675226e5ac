"""The hashes of items by token, and an open-addressing table back to tokens, looked up a numpy column at a time.

One thread writes; others may read meanwhile: they see an item or do not see it yet.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.arrays import grown

FIRST_SLOTS = 1 << 12
MAX_MOVED_SLOTS = 1 << 16  # a larger table is made once, for all tokens there may be: moving 16 k items takes 4 ms
# Hashes are scattered, so that a few thousand of them make the kernel give all of a table memory. Of more than 2 M
# items the table moves again: 0.4 s.
MAX_RESERVED_SLOTS = 1 << 23


class HashIndex:
    """A table that is at most a quarter full: linear probing finds 6 of 7 items at once, 130 k of a million in 2 ms.

    hashes: each token's item hash, 0 = none: uint64 [>= tokens]
    Slots hold tokens, 0 = empty, whose hashes are looked up in `hashes`. Two items may have the same hash.
    """

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: the most tokens there will be"""
        self.hashes = np.zeros(1, np.uint64)
        self._slots = np.zeros(FIRST_SLOTS, np.int32)
        self._used = 0
        self._end = 0  # after the highest token there was: what is reserved beyond it is not looked at
        self._max_tokens = max_tokens

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """Return the tokens of item hashes (uint64 [n]), 0 for a missing one: int32 [n]."""
        slots = self._slots
        token_hashes = self.hashes
        probed = _first_slots(hashes, len(slots))
        tokens = slots.take(probed)
        # Clipped: a token that another thread has just given may be beyond this array, and is not seen yet.
        pending = np.flatnonzero(token_hashes.take(tokens, mode="clip") != hashes)
        probed = probed[pending]
        while pending.size:
            is_pending = tokens[pending] != 0
            pending = pending[is_pending]
            probed = (probed[is_pending] + 1) & (len(slots) - 1)
            found = slots.take(probed)
            tokens[pending] = found
            is_pending = token_hashes.take(found, mode="clip") != hashes[pending]
            pending = pending[is_pending]
            probed = probed[is_pending]
        return tokens

    def tokens_of_one(self, key: int) -> Iterator[int]:
        """Yield the tokens of all items with this hash, usually one or none."""
        slots = self._slots
        slot = key & (len(slots) - 1)
        while token := int(slots[slot]):
            if self.hashes[token] == key:
                yield token
            slot = (slot + 1) & (len(slots) - 1)

    def insert(self, key: int, token: int) -> None:
        """Insert an item hash, not 0, for a token that has none."""
        if 4 * (self._used + 1) > len(self._slots):
            self._grow()
        self._used += 1
        slot = key & (len(self._slots) - 1)
        while self._slots[slot] != 0:
            slot = (slot + 1) & (len(self._slots) - 1)
        self.hashes = grown(self.hashes, token + 1, self._max_tokens)
        self._end = max(self._end, token + 1)
        self.hashes[token] = key  # before the slot: a reader that sees the token sees its hash
        self._slots[slot] = token

    def remove(self, tokens: np.ndarray) -> None:
        """Remove these tokens, int [n], by moving the others to a new table: 0.1 s for a million."""
        is_left = self.hashes[: self._end] != 0
        is_left[tokens] = False
        left = np.flatnonzero(is_left).astype(np.int32)
        self._slots = _filled(left, self.hashes[left], len(self._slots))
        self._used = len(left)
        self.hashes[tokens] = 0

    def _grow(self) -> None:
        size = 4 * len(self._slots)
        if size > MAX_MOVED_SLOTS:
            size = max(size, min(1 << (4 * self._max_tokens - 1).bit_length(), MAX_RESERVED_SLOTS))
        tokens = np.flatnonzero(self.hashes[: self._end]).astype(np.int32)
        self._slots = _filled(tokens, self.hashes[tokens], size)


def _first_slots(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return where probing for these hashes begins: int64 [n]."""
    return (hashes & np.uint64(size - 1)).view(np.int64)


def _filled(tokens: np.ndarray, hashes: np.ndarray, size: int) -> np.ndarray:
    """Return slots, int32 [size], with these tokens."""
    slots = np.zeros(size, np.int32)
    probed = _first_slots(hashes, size)
    while tokens.size:
        free = slots[probed] == 0
        slots[probed[free]] = tokens[free]  # of several tokens the last one gets the slot, the others probe on
        is_pending = slots[probed] != tokens
        tokens = tokens[is_pending]
        probed = (probed[is_pending] + 1) & (size - 1)
    return slots
