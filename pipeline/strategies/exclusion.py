"""Items that a user's own history keeps off the user's slates: one rule for serving, replay and evaluation."""

import msgspec
import numpy as np

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
        mask = np.ones(len(histories.events), bool)
        if self.action_codes is not None:
            mask &= np.isin(histories.actions, self.action_codes)
        if self.window_ms and len(mask):
            ts_ms = histories.ts_ms
            newest = np.repeat(ts_ms[histories.offsets[1:] - 1], histories.lengths)
            mask &= ts_ms >= newest - self.window_ms
        return mask
