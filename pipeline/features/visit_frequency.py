"""Visit frequency: how many sessions a user began recently. The main input of the retention head.

HSTU's states describe what a user likes; the chance of a return depends mostly on how often the user came before.
"""

import numpy as np

from pipeline.features.event_features import after_pause
from pipeline.jagged import row_starts
from pipeline.records import DAY_S, Histories

WINDOWS_DAYS = (7, 30, 90)
N_VISIT_FEATURES = len(WINDOWS_DAYS) + 1
_SECONDS_BITS = 39  # of seconds since a user's first event, at most MAX_TS_MS; 24 bits are left for users


def visit_frequency(histories: Histories, positions: np.ndarray, ring_events: int) -> np.ndarray:
    """Return the features at these events from the rings that end with them: float32 [n, N_VISIT_FEATURES].

    log(1 + x) of: the number of sessions begun within each of WINDOWS_DAYS up to the event, the current one included;
    the days since the ring's first event, at most the longest window.
    positions: int64 [n]; ring_events: newest events of a user that a ring holds
    """
    ts_ms = histories.ts_ms
    starts = row_starts(histories.offsets)
    starts_session = after_pause(ts_ms)
    starts_session[histories.offsets[:-1][histories.lengths > 0]] = True
    sessions = np.cumsum(starts_session)  # [total] sessions begun up to and including each event
    elapsed_s = ts_ms // 1000 - ts_ms[starts] // 1000
    keys = (histories.users << _SECONDS_BITS) + elapsed_s  # ascending
    oldest = np.maximum(starts[positions], positions - ring_events + 1)  # [n] the rings' first events
    ring_s = elapsed_s[positions] - elapsed_s[oldest]
    columns = np.empty((len(positions), N_VISIT_FEATURES), np.float32)
    for column, days in enumerate(WINDOWS_DAYS):
        window_start = keys[positions] - np.minimum(ring_s, days * DAY_S)
        first = np.maximum(np.searchsorted(keys, window_start), oldest)
        columns[:, column] = sessions[positions] - sessions[first] + (starts_session[first] | (first == oldest))
    columns[:, -1] = np.minimum(ring_s / DAY_S, WINDOWS_DAYS[-1])
    return np.log1p(columns, out=columns)


def latest_visit_frequency(histories: Histories) -> np.ndarray:
    """Return the features at each ring's latest event: float32 [n, N_VISIT_FEATURES]; zeros without events."""
    columns = np.zeros((len(histories), N_VISIT_FEATURES), np.float32)
    present = histories.lengths > 0
    columns[present] = visit_frequency(histories, histories.offsets[1:][present] - 1, len(histories.events))
    return columns
