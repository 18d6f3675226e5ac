"""A log of changed tokens that several readers follow, each at its own pace."""

from collections.abc import Iterable

import numpy as np

KEPT = 1 << 16  # changes, 0.5 MiB; a reader further behind looks at all tokens, which costs milliseconds


class ChangeLog:
    """One thread writes; others may read meanwhile: they see a change or do not see it yet."""

    def __init__(self) -> None:
        self._kept: tuple[int, list[int]] = (0, [])  # position of the first kept change, and the changes

    @property
    def end(self) -> int:
        """Position after the latest change: the number of changes so far."""
        first, changes = self._kept
        return first + len(changes)

    def add(self, tokens: Iterable[int]) -> None:
        """Log changes of these tokens."""
        first, changes = self._kept
        changes.extend(tokens)
        if len(changes) > 2 * KEPT:
            self._kept = (first + len(changes) - KEPT, changes[-KEPT:])

    def since(self, position: int) -> np.ndarray | None:
        """Return the tokens that changed after a position, ascending, int64 [n]; None when it is no longer known."""
        first, changes = self._kept
        if position < first:
            return None
        return np.unique(np.array(changes[position - first :], np.int64))
