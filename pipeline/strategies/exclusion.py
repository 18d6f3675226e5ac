"""Items that a user's own history keeps off the user's slates: one rule for serving, training and evaluation."""

import msgspec
import numpy as np

from pipeline.jagged import latest_equal, row_starts
from pipeline.records import DAY_MS, EventSchema, Histories


class Exclusion(msgspec.Struct, frozen=True):
    """The rule that excludes an item: the user did one of the actions with it (None: any) in the last `window_ms`.

    The window ends with the user's newest event; 0: no limit.
    """

    action_codes: tuple[int, ...] | None = None
    window_ms: int = 0

    @classmethod
    def from_names(cls, actions: tuple[str, ...] | None, window_days: float, schema: EventSchema) -> "Exclusion":
        """Return the rule for actions given by name. KeyError names an action that the schema does not have."""
        codes = schema.action_codes()
        return cls(None if actions is None else tuple(codes[name] for name in actions), int(window_days * DAY_MS))

    def mask(self, histories: Histories) -> np.ndarray:
        """Return bool [total]: the events whose item must not be recommended to their user."""
        mask = self._selected(histories)
        if self.window_ms:
            newest = np.repeat(histories.offsets[1:] - 1, histories.lengths)
            mask &= self._is_recent(histories, np.arange(len(newest)), newest)
        return mask

    def excludes(self, histories: Histories, events: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """Return bool [m]: whether each event keeps its item off the slate that follows the user's event `newest`.

        events, newest: int64 [m], positions in the histories, each pair of one user
        """
        return self._selected(histories)[events] & self._is_recent(histories, events, newest)

    def excluded_targets(self, histories: Histories, max_events: int) -> np.ndarray:
        """Return bool [total]: events whose item this rule kept off the slate just before them.

        max_events: a ring's size; what it no longer holds excludes nothing
        """
        excluded = np.zeros(len(histories.events), bool)
        for part, chunk in histories.chunks():
            # The latest selected event: if this one excludes nothing, no earlier one does.
            latest = latest_equal(chunk.users, chunk.items, self._selected(chunk))
            oldest = np.maximum(row_starts(chunk.offsets), np.arange(len(latest)) - max_events)  # in the ring
            events = np.flatnonzero(latest >= oldest)
            excluded[part][events] = self._is_recent(chunk, latest[events], events - 1)
        return excluded

    def _selected(self, histories: Histories) -> np.ndarray:
        """Return bool [total]: events with one of the actions."""
        if self.action_codes is None:
            return np.ones(len(histories.events), bool)
        return np.isin(histories.actions, self.action_codes)

    def _is_recent(self, histories: Histories, events: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """Return bool [m]: whether each event is within the window that ends with the event `newest`."""
        if not self.window_ms:
            return np.ones(len(events), bool)
        ts_ms = histories.ts_ms
        return ts_ms[events] >= ts_ms[newest] - self.window_ms
