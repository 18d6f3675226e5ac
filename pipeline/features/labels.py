"""Labels that the heads predict: engagement, retention and monetization, from the events that follow.

A position of a user's sequence is labelled by its successor. With e the user's next event:
    engagement    e is a like, cart, purchase or share, a rating of 4 or more, or has a dwell of 30 s or more
    retention     a new session (an event 30 minutes or more after its predecessor) begins within 7 days after e
    monetization  e is a cart or purchase
Logs do not hold items that were shown and ignored: the heads rank outcomes among items that users interacted with.
"""

import numpy as np

from pipeline.features.event_features import after_pause
from pipeline.records import DAY_MS, DWELL_STEP_MS, EventSchema, Histories, encode_value

TASKS = ("engagement", "retention", "monetization")
ENGAGING = ("like", "cart", "purchase", "share")
MONETIZING = ("cart", "purchase")
LIKED_STARS = 4.0
LONG_DWELL_MS = 30_000
HORIZON_MS = 7 * DAY_MS


def compute_labels(histories: Histories, schema: EventSchema, end_ms: int) -> np.ndarray:
    """Return the labels of each event's successor, by TASKS: float32 [total, 3].

    NaN for a user's last event, and for the retention of an event whose horizon exceeds `end_ms`, the log's end:
    counting only the returns that the log still shows would favour late events.
    """
    labels = np.full((len(histories.events), len(TASKS)), np.nan, np.float32)
    for part, chunk in histories.chunks():
        _fill_labels(labels[part], chunk, schema, end_ms)
    return labels


def compute_log_labels(histories: Histories, schema: EventSchema) -> np.ndarray:
    """Return the labels of a full log, which ends with its newest event; see `compute_labels`."""
    return compute_labels(histories, schema, int(histories.ts_ms.max(initial=0)))


def _fill_labels(labels: np.ndarray, histories: Histories, schema: EventSchema, end_ms: int) -> None:
    users = histories.users
    labelled = np.flatnonzero(users[1:] == users[:-1])
    successors = labelled + 1
    labels[labelled, 0] = engaged(histories, schema)[successors]
    labels[labelled, 1] = _returned(histories, end_ms)[successors]
    labels[labelled, 2] = np.isin(histories.actions, action_codes(MONETIZING, schema))[successors]


def action_codes(actions: tuple[str, ...], schema: EventSchema) -> list[int]:
    """Return the ring's codes of these actions, without those that are not in the schema."""
    codes = schema.action_codes()
    return [codes[name] for name in actions if name in codes]


def engaged(histories: Histories, schema: EventSchema) -> np.ndarray:
    """Return whether each event itself is engaged: bool [total]."""
    liked = np.isin(histories.actions, action_codes(("rate",), schema))
    liked &= histories.events["value"] >= encode_value(LIKED_STARS)
    dwelt = histories.events["dwell"] > LONG_DWELL_MS // DWELL_STEP_MS  # code = 1 + steps
    return liked | dwelt | np.isin(histories.actions, action_codes(ENGAGING, schema))


def _returned(histories: Histories, end_ms: int) -> np.ndarray:
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
    returned = has_next & (users[next_start] == users) & (ts_ms[next_start] - ts_ms <= HORIZON_MS)
    return np.where(ts_ms + HORIZON_MS <= end_ms, returned, np.nan).astype(np.float32)
