"""Labels that the heads predict: engagement, retention and monetization, from the events that follow.

A position of a user's sequence is labelled by its successor. With e the user's next event:
    engagement    e is engaged: by its action, its value or its dwell
    retention     a new session (an event 30 minutes or more after its predecessor) begins within some days after e
    monetization  e is paid: by its action
Logs do not hold items that were shown and ignored: the heads rank outcomes among items that users interacted with.
"""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.event_clock import latest_believed
from pipeline.features.event_features import after_pause
from pipeline.records import DAY_MS, DWELL_STEP_MS, MAX_STEPS_U16, EventSchema, Histories, encode_value

TASKS = ("engagement", "retention", "monetization")
MAX_DWELL_MS = MAX_STEPS_U16 * DWELL_STEP_MS


class LabelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of what the heads predict. Actions that the schema does not have are ignored.

    The artifact keeps them: features count engaged events, so a worker must read what training read.
    """

    engaged_actions: tuple[str, ...] = ("like", "cart", "purchase", "share")
    valued_actions: tuple[str, ...] = ("rate",)  # an event of these is engaged from `engaged_value` on
    engaged_value: Annotated[float, Meta(ge=0, le=1e9)] = 4.0  # stars of five
    engaged_dwell_ms: Annotated[int, Meta(ge=0, le=MAX_DWELL_MS)] = 30_000  # of any action; 0: dwell does not count
    paid_actions: tuple[str, ...] = ("cart", "purchase")  # of monetization, and of an item's usual value
    retention_days: Annotated[float, Meta(gt=0, le=3650)] = 7.0  # the user is back if a new session begins by then


@dataclass(slots=True, frozen=True)
class LabelRules:
    """Label options in the codes of a ring."""

    engaged_codes: tuple[int, ...]
    valued_codes: tuple[int, ...]
    min_value_code: int
    min_dwell_code: int
    paid_codes: tuple[int, ...]
    retention_ms: int

    @classmethod
    def from_options(cls, schema: EventSchema, options: LabelOptions | None = None) -> "LabelRules":
        """Return the rules for events of this schema; None: the default options."""
        options = options or LabelOptions()
        codes = schema.action_codes()

        def known(actions: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(sorted(codes[name] for name in set(actions) if name in codes))

        dwell_steps = -(-options.engaged_dwell_ms // DWELL_STEP_MS) if options.engaged_dwell_ms else MAX_STEPS_U16 + 1
        return cls(
            engaged_codes=known(options.engaged_actions),
            valued_codes=known(options.valued_actions),
            min_value_code=encode_value(options.engaged_value),
            min_dwell_code=1 + dwell_steps,
            paid_codes=known(options.paid_actions),
            retention_ms=round(options.retention_days * DAY_MS),
        )


def engaged(histories: Histories, rules: LabelRules) -> np.ndarray:
    """Return whether each event itself is engaged: bool [total]."""
    actions = histories.actions
    liked = np.isin(actions, rules.valued_codes) & (histories.events["value"] >= rules.min_value_code)
    dwelt = histories.events["dwell"] >= rules.min_dwell_code
    return liked | dwelt | np.isin(actions, rules.engaged_codes)


def paid(histories: Histories, rules: LabelRules) -> np.ndarray:
    """Return whether each event itself is paid: bool [total]."""
    return np.isin(histories.actions, rules.paid_codes)


def compute_labels(histories: Histories, rules: LabelRules, end_ms: int) -> np.ndarray:
    """Return the labels of each event's successor, by TASKS: float32 [total, 3].

    NaN for a user's last event, and for the retention of an event whose horizon exceeds `end_ms`, the log's end:
    counting only the returns that the log still shows would favour late events.
    """
    labels = np.full((len(histories.events), len(TASKS)), np.nan, np.float32)
    for part, chunk in histories.chunks():
        _fill_labels(labels[part], chunk, rules, end_ms)
    return labels


def compute_log_labels(histories: Histories, rules: LabelRules) -> np.ndarray:
    """Return the labels of a full log, which ends with its newest event that is believed; see `compute_labels`."""
    return compute_labels(histories, rules, latest_believed(histories.ts_ms))


def _fill_labels(labels: np.ndarray, histories: Histories, rules: LabelRules, end_ms: int) -> None:
    users = histories.users
    labelled = np.flatnonzero(users[1:] == users[:-1])
    successors = labelled + 1
    labels[labelled, 0] = engaged(histories, rules)[successors]
    labels[labelled, 1] = _returned(histories, rules.retention_ms, end_ms)[successors]
    labels[labelled, 2] = paid(histories, rules)[successors]


def _returned(histories: Histories, horizon_ms: int, end_ms: int) -> np.ndarray:
    """Return whether the user's next session begins within the horizon after the event: float32 [total].

    NaN when the log ends before the horizon.
    """
    ts_ms = histories.ts_ms
    users = histories.users
    session_starts = np.flatnonzero((users[1:] == users[:-1]) & after_pause(ts_ms)[1:]) + 1
    after = np.searchsorted(session_starts, np.arange(len(ts_ms)), side="right")
    has_next = after < len(session_starts)
    next_start = (
        session_starts[np.minimum(after, len(session_starts) - 1)] if len(session_starts) else np.zeros_like(users)
    )
    returned = has_next & (users[next_start] == users) & (ts_ms[next_start] - ts_ms <= horizon_ms)
    return np.where(ts_ms + horizon_ms <= end_ms, returned, np.nan).astype(np.float32)
