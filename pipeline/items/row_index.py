"""Translation between the rows of a model's item table, in the order of its training, and the process's tokens.

A row belongs to an item, by the item's hash. When the vocabulary evicts the item, the row is detached before its token
is looked up again; when the item is back, the row is attached to the token it has then.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.arrays import grown
from pipeline.errors import ArtifactError
from pipeline.items.vocabulary import UNKNOWN, Vocabulary

NO_ROWS = np.empty(0, np.int64)


class RowIndex:
    """Row r of the table is item_ids[r - 1], row 0 the unknown item. Models come and go while tokens stay.

    Every call costs what has changed, not what the table holds.
    """

    def __init__(self, vocabulary: Vocabulary, item_ids: Sequence[str]) -> None:
        """Index items that the vocabulary has admitted. ArtifactError when it had no token for one of them."""
        self._followed = vocabulary.changes.end
        tokens = np.concatenate([np.array([UNKNOWN], np.int32), vocabulary.tokens_of_ids(item_ids)])  # [rows]
        if unassigned := int((tokens[1:] == UNKNOWN).sum()):
            raise ArtifactError(
                f"artifact: {unassigned} of its {len(item_ids)} items have no token: the vocabulary is full;"
                f" counters.max_items is {vocabulary.max_items}: set it higher and restart"
            )
        self._vocabulary = vocabulary
        self._size = len(tokens)
        self._trained_rows = self._size  # row 0 and the training items'
        self._tokens = grown(tokens, self._size + 1, self.max_rows)  # int32 [>= rows]
        self._hashes = grown(vocabulary.hashes[tokens], self._size + 1, self.max_rows)  # uint64 [>= rows]
        self._blocked = grown(vocabulary.blocked[tokens], self._size + 1, self.max_rows)  # bool [>= rows]
        self._rows = np.zeros(1, np.int32)  # [> tokens], the last one for all later tokens
        self._detached: dict[int, int] = {}  # item hash to row, of training items without a token
        self._free: list[int] = []  # rows of evicted items that came after training, ascending
        self._attach(np.arange(self._size), tokens)

    @property
    def max_rows(self) -> int:
        """The largest `len` there will be: tables indexed by row reserve room for it."""
        return self._trained_rows + self._vocabulary.max_items

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._size

    def sync(self) -> tuple[np.ndarray, np.ndarray]:
        """Follow the vocabulary. Returns the rows that got or lost a token, and those (un)blocked, too: int64 [n] each.

        The rows of evicted items are detached, those of items that are back attached; both are ascending.
        """
        end = self._vocabulary.changes.end
        if end == self._followed:
            return NO_ROWS, NO_ROWS
        tokens = self._vocabulary.changes.since(self._followed)
        if tokens is None:
            tokens = np.arange(len(self._vocabulary))
        self._followed = end
        lost = self._detach_evicted(tokens)
        found = self._attach_returned(tokens)
        touched = np.unique(np.concatenate([lost, found, self.rows(tokens)])).astype(np.int64)
        touched = touched[touched != UNKNOWN]
        is_blocked = self._vocabulary.blocked[self._tokens[touched]]
        changed = touched[is_blocked != self._blocked[touched]]
        self._blocked[touched] = is_blocked
        return np.union1d(lost, found), changed

    def allocate(self, tokens: np.ndarray) -> np.ndarray:
        """Return rows, int64 [n], for tokens, int [n], that have none.

        Rows of evicted items that came after training are used first, then new ones at the end.
        """
        reused = self._free[: len(tokens)]
        del self._free[: len(tokens)]
        appended = np.arange(self._size, self._size + len(tokens) - len(reused))
        rows = np.concatenate([np.array(reused, np.int64), appended])
        self._size += len(appended)
        self._tokens = grown(self._tokens, self._size, self.max_rows)
        self._hashes = grown(self._hashes, self._size, self.max_rows)
        self._blocked = grown(self._blocked, self._size, self.max_rows)
        self._tokens[rows] = tokens
        self._hashes[rows] = self._vocabulary.hashes[tokens]
        self._blocked[rows] = self._vocabulary.blocked[tokens]
        self._attach(rows, tokens)
        return rows

    @property
    def blocked(self) -> np.ndarray:
        """Which rows must not be recommended, row 0, those of delisted items and detached ones: bool [rows]."""
        return self._blocked[: self._size]

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return the rows of tokens, 0 for an item that the model does not have: int32 of the tokens' shape."""
        return self._rows.take(tokens, mode="clip")

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of rows: int32 of the rows' shape."""
        return self._tokens[rows]

    def _detach_evicted(self, tokens: np.ndarray) -> np.ndarray:
        """Detach the rows whose items have lost one of these tokens; return them, int64 [n]."""
        rows = self.rows(tokens).astype(np.int64)
        lost = rows[(rows != UNKNOWN) & (self._hashes[rows] != self._vocabulary.hashes[tokens])]
        self._rows[self._tokens[lost]] = UNKNOWN
        self._tokens[lost] = UNKNOWN
        is_trained = lost < self._trained_rows
        trained = lost[is_trained]
        self._detached |= zip(self._hashes[trained].tolist(), trained.tolist(), strict=True)
        self._free = sorted([*self._free, *lost[~is_trained].tolist()])  # a new item's record went with its token
        return lost

    def _attach_returned(self, tokens: np.ndarray) -> np.ndarray:
        """Attach the detached rows whose items have one of these tokens now; return them, int64 [n]."""
        if not self._detached:
            return NO_ROWS
        hashes = self._vocabulary.hashes[tokens].tolist()
        is_back = np.array([key in self._detached for key in hashes], bool)
        rows = np.array([self._detached.pop(key) for key in hashes if key in self._detached], np.int64)
        self._tokens[rows] = tokens[is_back]
        self._attach(rows, self._tokens[rows])
        return rows

    def _attach(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        self._rows = grown(self._rows, int(tokens.max(initial=0)) + 2, self._vocabulary.max_tokens + 1)
        self._rows[tokens] = rows
        self._rows[UNKNOWN] = UNKNOWN
