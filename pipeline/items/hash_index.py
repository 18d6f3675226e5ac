"""An open-addressing table from item hashes to tokens that is read as whole numpy columns.

One thread writes; others may read meanwhile: they see an item or do not see it yet.
"""

import numpy as np

FIRST_SLOTS = 1 << 12
Slots = tuple[np.ndarray, np.ndarray]  # keys uint64, 0 = empty; values int32


class HashIndex:
    """At most half full, so that three rounds of linear probing settle nearly all of a column."""

    def __init__(self) -> None:
        self._slots = _empty(FIRST_SLOTS)
        self._used = 0

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] item hashes -> int32 [n] tokens, 0 where there is none."""
        keys, values = self._slots
        found = np.zeros(len(hashes), np.int32)
        slots = hashes & np.uint64(len(keys) - 1)
        open_rows = np.arange(len(hashes))
        while open_rows.size:
            seen = keys[slots[open_rows]]
            hit = seen == hashes[open_rows]
            found[open_rows[hit]] = values[slots[open_rows[hit]]]
            open_rows = open_rows[~hit & (seen != 0)]
            slots[open_rows] = (slots[open_rows] + np.uint64(1)) & np.uint64(len(keys) - 1)
        return found

    def insert(self, key: int, token: int) -> None:
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
        """Forget these tokens, int [n]: what is left is put into a new table, 0.2 s for a million."""
        keys, values = self._slots
        gone = np.zeros(int(values.max()) + 1, bool)
        gone[tokens] = True
        self._rebuild((keys != 0) & ~gone[values], len(keys))

    def _rebuild(self, kept: np.ndarray, size: int) -> None:
        keys, values = self._slots
        self._slots = _filled(keys[kept], values[kept], size)
        self._used = int(kept.sum())


def _empty(size: int) -> Slots:
    return np.zeros(size, np.uint64), np.zeros(size, np.int32)


def _filled(hashes: np.ndarray, tokens: np.ndarray, size: int) -> Slots:
    keys, values = _empty(size)
    slots = hashes & np.uint64(size - 1)
    open_rows = np.arange(len(hashes))
    while open_rows.size:
        at, wanted = slots[open_rows], hashes[open_rows]
        free = keys[at] == 0
        keys[at[free]] = wanted[free]  # of several for one slot the last one has it, the others go on
        settled = keys[at] == wanted
        values[at[settled]] = tokens[open_rows[settled]]
        open_rows = open_rows[~settled]
        slots[open_rows] = (slots[open_rows] + np.uint64(1)) & np.uint64(size - 1)
    return keys, values
