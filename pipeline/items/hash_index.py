"""An open-addressing table from item hashes to tokens, looked up a numpy column at a time.

One thread writes; others may read meanwhile: they see an item or do not see it yet.
"""

import numpy as np

FIRST_SLOTS = 1 << 12
Slots = tuple[np.ndarray, np.ndarray]  # keys uint64, 0 = empty; values int32


class HashIndex:
    """A table that is at most half full, so that three rounds of linear probing find nearly all of a column."""

    def __init__(self) -> None:
        self._slots = _empty(FIRST_SLOTS)
        self._used = 0

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """Return the tokens of item hashes (uint64 [n]), 0 for a missing one: int32 [n]."""
        keys, values = self._slots
        tokens = np.zeros(len(hashes), np.int32)
        slots = hashes & np.uint64(len(keys) - 1)
        pending = np.arange(len(hashes))
        while pending.size:
            probed = keys[slots[pending]]
            hit = probed == hashes[pending]
            tokens[pending[hit]] = values[slots[pending[hit]]]
            pending = pending[~hit & (probed != 0)]
            slots[pending] = (slots[pending] + np.uint64(1)) & np.uint64(len(keys) - 1)
        return tokens

    def insert(self, key: int, token: int) -> None:
        """Insert an item hash (not 0) that the table does not have."""
        keys, values = self._slots
        self._used += 1
        if 2 * self._used > len(keys):
            self._rebuild(keys != 0, 4 * len(keys))
            keys, values = self._slots
        slot = key & (len(keys) - 1)
        while keys[slot] != 0:
            slot = (slot + 1) & (len(keys) - 1)
        values[slot] = token  # before the key: a reader that sees the key sees its token
        keys[slot] = key

    def remove(self, tokens: np.ndarray) -> None:
        """Remove these tokens, int [n], by moving the others to a new table: 0.2 s for a million."""
        keys, values = self._slots
        removed = np.zeros(int(values.max()) + 1, bool)
        removed[tokens] = True
        self._rebuild((keys != 0) & ~removed[values], len(keys))

    def _rebuild(self, mask: np.ndarray, size: int) -> None:
        keys, values = self._slots
        self._slots = _filled(keys[mask], values[mask], size)
        self._used = int(mask.sum())


def _empty(size: int) -> Slots:
    return np.zeros(size, np.uint64), np.zeros(size, np.int32)


def _filled(hashes: np.ndarray, tokens: np.ndarray, size: int) -> Slots:
    keys, values = _empty(size)
    slots = hashes & np.uint64(size - 1)
    pending = np.arange(len(hashes))
    while pending.size:
        probed = slots[pending]
        pending_hashes = hashes[pending]
        free = keys[probed] == 0
        keys[probed[free]] = pending_hashes[free]  # of several hashes the last one gets the slot, the others probe on
        placed = keys[probed] == pending_hashes
        values[probed[placed]] = tokens[pending[placed]]
        pending = pending[~placed]
        slots[pending] = (slots[pending] + np.uint64(1)) & np.uint64(size - 1)
    return keys, values
