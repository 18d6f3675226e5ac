"""The rhythm of a user's visits: how many sessions began lately. What the retention head reads first.

HSTU's states describe what a user likes; the chance to return is mostly how often they came before.
"""

import numpy as np

from pipeline.features.event_features import SESSION_GAP_MS
from pipeline.records import DAY_S, Histories

WINDOWS_DAYS = (7, 30, 90)
N_VISIT_FEATURES = len(WINDOWS_DAYS) + 1
_SECONDS_BITS = 33  # of a user's own clock: 272 years


def visit_frequency(histories: Histories, at: np.ndarray) -> np.ndarray:
    """float32 [n, RHYTHMS] at these events, int64 [n] positions, from each one and its user's earlier events alone.

    log(1 + x) of: the sessions begun within each of WINDOWS_DAYS up to the event, the running one included; the days,
    at most the longest window, since the user's first event.
    """
    ts_ms, starts = histories.ts_ms, np.repeat(histories.offsets[:-1], histories.lengths)
    begins = np.diff(ts_ms, prepend=ts_ms[:1]) >= SESSION_GAP_MS
    begins[histories.offsets[:-1][histories.lengths > 0]] = True
    sessions = np.cumsum(begins)  # [total] begun in all, up to and with each event
    elapsed_s = (ts_ms - ts_ms[starts]) // 1000
    keys = (histories.users << _SECONDS_BITS) + elapsed_s  # ascending
    columns = np.empty((len(at), N_VISIT_FEATURES), np.float32)
    for number, days in enumerate(WINDOWS_DAYS):
        earliest = keys[at] - np.minimum(elapsed_s[at], days * DAY_S)
        first = np.searchsorted(keys, earliest)
        columns[:, number] = sessions[at] - sessions[first] + begins[first]
    columns[:, -1] = np.minimum(elapsed_s[at] / DAY_S, WINDOWS_DAYS[-1])
    return np.log1p(columns, out=columns)


def latest_visit_frequency(histories: Histories) -> np.ndarray:
    """float32 [n, RHYTHMS] at each user's newest event; zeros for a user without events."""
    columns = np.zeros((len(histories), N_VISIT_FEATURES), np.float32)
    present = histories.lengths > 0
    columns[present] = visit_frequency(histories, histories.offsets[1:][present] - 1)
    return columns
