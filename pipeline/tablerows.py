"""A model's item table has rows in the order of its training; the process has tokens. Each by the other."""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.vocabulary import UNKNOWN, Vocabulary


class TableRows:
    """Row r of a table is item_ids[r - 1], row 0 the unknown item. So that models come and go while tokens stay."""

    def __init__(self, vocabulary: Vocabulary, item_ids: Sequence[str]) -> None:
        """The vocabulary has the items already. ArtifactError where it had no room for one of them."""
        self._tokens = np.array([UNKNOWN, *map(vocabulary.token, item_ids)], np.int32)  # [rows]
        if homeless := int((self._tokens[1:] == UNKNOWN).sum()):
            raise ArtifactError(
                f"artifact: {homeless} of its {len(item_ids)} items have no place beside those that the process knows;"
                f" counters.max_items is {vocabulary.max_items}: set it higher and start again"
            )
        self._rows = np.zeros(int(self._tokens.max()) + 2, np.int32)  # [tokens + 1], the last one for all later tokens
        self._rows[self._tokens] = np.arange(len(self._tokens))

    def extend(self, tokens: np.ndarray) -> None:
        """Further rows at the end, for tokens int [n] that have none."""
        first = len(self._tokens)
        self._tokens = np.concatenate([self._tokens, tokens.astype(np.int32)])
        rows = np.zeros(max(len(self._rows), int(tokens.max()) + 2), np.int32)
        rows[: len(self._rows)] = self._rows
        rows[tokens] = np.arange(first, len(self._tokens))
        self._rows = rows

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """int32, of the tokens' shape: 0 for an item that the model does not know."""
        return self._rows.take(tokens, mode="clip")

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """int32, of the rows' shape."""
        return self._tokens[rows]
