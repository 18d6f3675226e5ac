"""Item ids, their 64-bit hashes (what rings hold) and their process-local tokens (what tables are indexed by).

Token 0 is 'unknown' and padding. Tokens are dense, start at 1, and never change their meaning while the process lives.
"""

from collections.abc import Iterable

import numpy as np

from pipeline.records import item_hash

UNKNOWN = 0


class Vocabulary:
    """An open-addressing table from hash to token that is read as whole numpy columns.

    One thread admits; others may look up meanwhile: they see an item or do not see it yet.
    """

    def __init__(self, item_ids: Iterable[str] = (), max_items: int = 1_000_000) -> None:
        self.max_items = max_items
        self.item_ids: list[str] = [""]
        self.refused = 0  # items beyond max_items: they stay unknown
        self._tokens: dict[str, int] = {}
        self._table = _empty_table(1 << 12)
        self.admit(item_ids)

    def __len__(self) -> int:
        """Number of tokens, the unknown one included: the first size a table over tokens needs."""
        return len(self.item_ids)

    def admit(self, item_ids: Iterable[str]) -> None:
        """Give every new item a token at once; known ones keep theirs."""
        for item_id in item_ids:
            if item_id not in self._tokens:
                self._admit(item_id)

    def token(self, item_id: str) -> int:
        return self._tokens.get(item_id, UNKNOWN)

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] item hashes -> int32 [n] tokens, UNKNOWN where there is none."""
        keys, values = self._table
        found = np.zeros(len(hashes), np.int32)
        slots = hashes & np.uint64(len(keys) - 1)
        open_rows = np.arange(len(hashes))
        while open_rows.size:  # linear probing; at half load three rounds settle nearly all
            seen = keys[slots[open_rows]]
            hit = seen == hashes[open_rows]
            found[open_rows[hit]] = values[slots[open_rows[hit]]]
            open_rows = open_rows[~hit & (seen != 0)]
            slots[open_rows] = (slots[open_rows] + np.uint64(1)) & np.uint64(len(keys) - 1)
        return found

    def _admit(self, item_id: str) -> None:
        if len(self.item_ids) > self.max_items:
            self.refused += 1
            return
        token = len(self.item_ids)
        self.item_ids.append(item_id)
        self._tokens[item_id] = token
        if 2 * token > len(self._table[0]):
            self._table = self._rebuilt(4 * len(self._table[0]))
        _insert(self._table, item_hash(item_id), token)

    def _rebuilt(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        table = _empty_table(size)
        for token, item_id in enumerate(self.item_ids[1:-1], 1):
            _insert(table, item_hash(item_id), token)
        return table


def _empty_table(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(size, np.uint64), np.zeros(size, np.int32)


def _insert(table: tuple[np.ndarray, np.ndarray], key: int, token: int) -> None:
    keys, values = table
    slot = key & (len(keys) - 1)
    while keys[slot] != 0:
        slot = (slot + 1) & (len(keys) - 1)
    values[slot] = token  # before the key: a reader that sees the key sees its token
    keys[slot] = key
