"""A model's item table has rows in the order of its training; the process has tokens. Each by the other.

A row belongs to an item, by its hash. When the vocabulary retires the item the row is cut off, before the token that
led to it is read again; when the item comes back the row is found by whatever token it has then.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.items.vocabulary import UNKNOWN, Vocabulary

NONE = np.empty(0, np.int64)


class RowIndex:
    """Row r of a table is item_ids[r - 1], row 0 the unknown item. So that models come and go while tokens stay."""

    def __init__(self, vocabulary: Vocabulary, item_ids: Sequence[str]) -> None:
        """The vocabulary has the items already. ArtifactError where it had no room for one of them."""
        self._tokens = np.array([UNKNOWN, *map(vocabulary.token, item_ids)], np.int32)  # [rows]
        if homeless := int((self._tokens[1:] == UNKNOWN).sum()):
            raise ArtifactError(
                f"artifact: {homeless} of its {len(item_ids)} items have no place beside those that the process knows;"
                f" counters.max_items is {vocabulary.max_items}: set it higher and start again"
            )
        self._vocabulary, self._trained = vocabulary, len(self._tokens)
        self._hashes = vocabulary.hashes[self._tokens]  # uint64 [rows]
        self._rows = np.zeros(1, np.int32)  # [tokens + 1], the last one for all later tokens
        self._has_unassigned, self._state = False, (vocabulary.version, 0)
        self._attach(np.arange(self._trained), self._tokens)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._tokens)

    def sync(self) -> np.ndarray:
        """Cut off the rows of retired items, attach those of items that are back. Returns all of them, int64 [n]."""
        state = self._vocabulary.version, self._vocabulary.admitted_count if self._has_unassigned else 0
        if state == self._state:
            return NONE
        lost = np.flatnonzero(self._vocabulary.hashes[self._tokens] != self._hashes)
        self._rows[self._tokens[lost]] = UNKNOWN
        self._hashes[lost[lost >= self._trained]] = 0  # what its record said was forgotten with the item
        self._tokens[lost] = self._vocabulary.tokens(self._hashes[lost])
        self._attach(lost, self._tokens[lost])
        self._has_unassigned = bool((self._tokens[1 : self._trained] == UNKNOWN).any())
        self._state = self._vocabulary.version, self._vocabulary.admitted_count if self._has_unassigned else 0
        return lost

    def allocate(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [n]: rows for tokens, int [n], that have none: of retired items that came after training, then further
        ones at the end."""
        free = self._trained + np.flatnonzero(self._tokens[self._trained :] == UNKNOWN)
        further = np.arange(len(self), len(self) + max(0, len(tokens) - len(free)))
        rows = np.concatenate([free, further])[: len(tokens)]
        self._tokens = np.append(self._tokens, np.zeros(len(further), np.int32))
        self._hashes = np.append(self._hashes, np.zeros(len(further), np.uint64))
        self._tokens[rows], self._hashes[rows] = tokens, self._vocabulary.hashes[tokens]
        self._attach(rows, tokens)
        return rows

    @property
    def blocked_rows(self) -> np.ndarray:
        """int64: rows that must not be recommended: row 0, those of withdrawn items, and those that are cut off."""
        return np.flatnonzero(self._vocabulary.blocked[self._tokens])

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """int32, of the tokens' shape: 0 for an item that the model does not know."""
        return self._rows.take(tokens, mode="clip")

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """int32, of the rows' shape."""
        return self._tokens[rows]

    def _attach(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        wanted = int(tokens.max(initial=0)) + 2
        if wanted > len(self._rows):
            self._rows = np.append(self._rows, np.zeros(wanted - len(self._rows), np.int32))
        self._rows[tokens] = rows
        self._rows[UNKNOWN] = UNKNOWN
