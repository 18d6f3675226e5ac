"""Translation between the rows of a model's item table, in the order of its training, and the process's tokens.

A row belongs to an item, by the item's hash. When the vocabulary evicts the item, the row is detached before its token
is looked up again; when the item is back, the row is attached to the token it has then.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.items.vocabulary import UNKNOWN, Vocabulary

NO_ROWS = np.empty(0, np.int64)


class RowIndex:
    """Row r of the table is item_ids[r - 1], row 0 the unknown item. Models come and go while tokens stay."""

    def __init__(self, vocabulary: Vocabulary, item_ids: Sequence[str]) -> None:
        """Index items that the vocabulary has admitted. ArtifactError when it had no token for one of them."""
        self._tokens = np.array([UNKNOWN, *map(vocabulary.token, item_ids)], np.int32)  # [rows]
        if unassigned := int((self._tokens[1:] == UNKNOWN).sum()):
            raise ArtifactError(
                f"artifact: {unassigned} of its {len(item_ids)} items have no token: the vocabulary is full;"
                f" counters.max_items is {vocabulary.max_items}: set it higher and restart"
            )
        self._vocabulary = vocabulary
        self._trained_rows = len(self._tokens)  # row 0 and the training items'
        self._hashes = vocabulary.hashes[self._tokens]  # uint64 [rows]
        self._rows = np.zeros(1, np.int32)  # [tokens + 1], the last one for all later tokens
        self._has_unassigned = False  # a training item has no token
        self._synced = (vocabulary.version, 0)
        self._attach(np.arange(self._trained_rows), self._tokens)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._tokens)

    def sync(self) -> np.ndarray:
        """Detach the rows of evicted items, attach those of items that are back. Returns these rows, int64 [n]."""
        if self._sync_state() == self._synced:
            return NO_ROWS
        changed = np.flatnonzero(self._vocabulary.hashes[self._tokens] != self._hashes)
        self._rows[self._tokens[changed]] = UNKNOWN
        self._hashes[changed[changed >= self._trained_rows]] = 0  # a new item's record was cleared at its eviction
        self._tokens[changed] = self._vocabulary.tokens(self._hashes[changed])
        self._attach(changed, self._tokens[changed])
        self._has_unassigned = bool((self._tokens[1 : self._trained_rows] == UNKNOWN).any())
        self._synced = self._sync_state()
        return changed

    def allocate(self, tokens: np.ndarray) -> np.ndarray:
        """Return rows, int64 [n], for tokens, int [n], that have none.

        Rows of evicted items that came after training are used first, then new ones at the end.
        """
        free = self._trained_rows + np.flatnonzero(self._tokens[self._trained_rows :] == UNKNOWN)
        appended = np.arange(len(self), len(self) + max(0, len(tokens) - len(free)))
        rows = np.concatenate([free, appended])[: len(tokens)]
        self._tokens = np.append(self._tokens, np.zeros(len(appended), np.int32))
        self._hashes = np.append(self._hashes, np.zeros(len(appended), np.uint64))
        self._tokens[rows] = tokens
        self._hashes[rows] = self._vocabulary.hashes[tokens]
        self._attach(rows, tokens)
        return rows

    @property
    def blocked_rows(self) -> np.ndarray:
        """Rows that must not be recommended: row 0, those of delisted items and detached ones: int64."""
        return np.flatnonzero(self._vocabulary.blocked[self._tokens])

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return the rows of tokens, 0 for an item that the model does not have: int32 of the tokens' shape."""
        return self._rows.take(tokens, mode="clip")

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of rows: int32 of the rows' shape."""
        return self._tokens[rows]

    def _sync_state(self) -> tuple[int, int]:
        return self._vocabulary.version, self._vocabulary.admitted_count if self._has_unassigned else 0

    def _attach(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        size = int(tokens.max(initial=0)) + 2
        if size > len(self._rows):
            self._rows = np.append(self._rows, np.zeros(size - len(self._rows), np.int32))
        self._rows[tokens] = rows
        self._rows[UNKNOWN] = UNKNOWN
