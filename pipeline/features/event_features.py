"""Turn packed histories into the model's packed inputs; the same code in training, evaluation and serving.

Row i describes event i from its own and earlier events only, so a row never changes when later events arrive.
Each feature is a small integer, a row of one embedding table: the features of an event are one gather and one sum, and
the same table rows hold the log strengths that say how much an event weighs.

| group | columns |
|---|---|
| temporal | gap to the previous event, hour, weekday, position in the sequence and in the session |
| strength | action, value, dwell, repetition, position where the item was shown |
| context | device, context |
| item | its age at the event, its price relative to the user's mean price |
| profile | over the user's latest 127 events: action mix, value level, novelty, mean gap, category affinity |

The gap to the request is not a column: row i answers a request at its own time, and the time bias covers its gaps.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from pipeline.features.rolling import WINDOW_EVENTS, RollingWindows
from pipeline.items.catalogue import ItemFacts
from pipeline.jagged import last_runs, ranges, row_starts
from pipeline.records import DAY_MS, Histories

SECONDS_CAP = (1 << 24) - 1  # 194 days: the largest time that float32 holds to the second
# A time's bucket is the number of these thresholds that it has reached: 2^j - 1 and 1.5 * 2^j - 1 seconds, rounded up.
TIME_THRESHOLDS = tuple(-(-(2 + half) * 2**j // 2) - 1 for j in range(25) for half in (0, 1))[1:49]
TIME_BUCKETS = len(TIME_THRESHOLDS) + 1
SESSION_GAP_S = 30 * 60  # a pause of this length begins a new session
COUNT_CAP = 2 * WINDOW_EVENTS + 1  # events counted back; trimming a ring changes nothing (HstuConfig.receptive_field)
_COUNT_BUCKETS = 17  # for counts from 0 to COUNT_CAP
_LEVELS = 16  # of a fraction or a difference; code 0 is reserved for unknown
_HOUR_MS = 3_600_000
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday; Monday is 0
_VALUE_SHIFT = 9  # buckets of 512 value codes, 0.17 in log1p(value): 1 to 5 stars fall into five buckets
_VALUE_LEVEL = 750.0  # value codes per level of a difference: a factor of 1.28 in 1 + value
_CONTEXTS = 64
_LOG_STEPS = 1024.0

# Number of codes per column; each column has its own rows in one table.
_SIZES = {
    "action": 256,
    "gap": TIME_BUCKETS + 1,
    "hour": 24,
    "weekday": 7,
    "value": 129,
    "dwell": TIME_BUCKETS,
    "events_before": _COUNT_BUCKETS,
    "events_in_session": _COUNT_BUCKETS,
    "device": 256,
    "context": _CONTEXTS + 1,
    "position": _COUNT_BUCKETS + 1,
    "repeats": _COUNT_BUCKETS,
    "item_age": TIME_BUCKETS + 1,
    "price_delta": _LEVELS + 1,
    "value_delta": _LEVELS + 1,
    "action_share": _LEVELS + 1,
    "mean_value": _LEVELS + 1,
    "mean_gap": TIME_BUCKETS + 1,
    "novelty": _LEVELS + 1,
    "affinity": _LEVELS + 1,
}
FEATURE_COLUMNS = tuple(_SIZES)
_STARTS = dict(zip(_SIZES, np.cumsum([0, *_SIZES.values()])[:-1].tolist(), strict=True))
N_FEATURE_IDS = sum(_SIZES.values())
N_FEATURES = len(_SIZES)
assert N_FEATURE_IDS < 1 << 15, "training keeps feature ids as int16"
# Identifies what a model was trained on: raise REVISION when a column changes its meaning but not its size.
REVISION = 2
FEATURE_LAYOUT = f"{REVISION}:{crc32(repr((_SIZES, TIME_THRESHOLDS, WINDOW_EVENTS)).encode()):08x}"


@dataclass(slots=True)
class EncoderInputs:
    """Packed model inputs of n users with `total` events.

    item_rows:   int32 [total], rows of the model's item table; 0 = an item without one
    feature_ids: int32 [total, N_FEATURES], rows of the feature table
    seconds:     int32 [total], since the user's first event; only differences are used
    offsets:     int64 [n + 1]
    """

    item_rows: np.ndarray
    feature_ids: np.ndarray
    seconds: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:  # int64 [n]
        return np.diff(self.offsets)

    def tail(self, max_events: int) -> "EncoderInputs":
        """Return each user's latest rows, at most `max_events` of them."""
        if self.lengths.max(initial=0) <= max_events:
            return self
        return self.gather_runs(*last_runs(self.offsets, max_events))

    def by_length(self) -> tuple["EncoderInputs", np.ndarray]:
        """Return the users, shortest first, and their numbers, int64 [n]: attention then needs no gathers."""
        users = np.argsort(self.lengths, kind="stable")
        return self.gather_runs(self.offsets[users], self.lengths[users]), users

    def present(self) -> tuple["EncoderInputs", np.ndarray]:
        """Return views of the users who have events, and their numbers, int64 [present]."""
        users = np.flatnonzero(self.lengths)
        offsets = np.append(self.offsets[users], self.offsets[-1:])
        return EncoderInputs(self.item_rows, self.feature_ids, self.seconds, offsets), users

    def gather_runs(self, starts: np.ndarray, lengths: np.ndarray) -> "EncoderInputs":
        """Return a copy of these runs of rows, one after the other."""
        index, offsets = ranges(starts, lengths)
        return EncoderInputs(self.item_rows[index], self.feature_ids[index], self.seconds[index], offsets)


def bucket_seconds(seconds: np.ndarray) -> np.ndarray:
    """Return the bucket by TIME_THRESHOLDS of integer seconds >= 0: int32 [n], from 0 to TIME_BUCKETS - 1.

    Read from the exponent and the first fraction bit of float32, which is exact below 2^24. Every backend must agree
    with the thresholds.
    """
    capped = np.minimum(seconds, SECONDS_CAP) + 1
    return (capped.astype(np.float32).view(np.int32) >> 22) - 254


def after_pause(ts_ms: np.ndarray) -> np.ndarray:
    """Return which events of a packed batch come SESSION_GAP_S or more after the one before: bool [total].

    In whole seconds of the clock, which is all that the encoder's inputs keep. Meaningless at a user's first event.
    """
    return np.diff(ts_ms // 1000, prepend=ts_ms[:1] // 1000) >= SESSION_GAP_S


def encoder_inputs(histories: Histories, item_rows: np.ndarray, facts: ItemFacts) -> EncoderInputs:
    """Return the inputs of full histories; trim them with `tail` afterwards, so that rows reflect earlier events.

    item_rows: int32 [total], each event's row of the model's item table, 0 = none; facts: of each event's item
    """
    ts_ms = histories.ts_ms
    offsets = histories.offsets
    starts = row_starts(offsets)  # [total] start of the run of each event's user
    since_ms = np.diff(ts_ms, prepend=ts_ms[:1])  # since the previous event; meaningless at a user's first
    columns = _temporal(ts_ms, since_ms, starts) | _strength(histories) | _profile(histories, since_ms, starts, facts)
    feature_ids = np.empty((len(item_rows), N_FEATURES), np.int32)
    for index, name in enumerate(FEATURE_COLUMNS):
        feature_ids[:, index] = columns[name]
        feature_ids[:, index] += _STARTS[name]
    # Whole seconds of the clock, not since the user's first event: where a ring was trimmed must change no difference.
    elapsed_s = ts_ms // 1000 - ts_ms[starts] // 1000
    seconds = np.minimum(elapsed_s, np.iinfo(np.int32).max).astype(np.int32)
    return EncoderInputs(item_rows, feature_ids, seconds, offsets)


def _temporal(ts_ms: np.ndarray, since_ms: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "gap": _gap_codes(since_ms, starts),
        "hour": ts_ms // _HOUR_MS % 24,
        "weekday": (ts_ms // DAY_MS + _EPOCH_WEEKDAY) % 7,
        "events_before": _count_buckets(starts),
        "events_in_session": _count_buckets(_session_starts(ts_ms, starts)),
    }


def _strength(histories: Histories) -> dict[str, np.ndarray]:
    events = histories.events
    position = events["position"].astype(np.int32)
    context = events["context"].astype(np.int32)
    return {
        "action": histories.actions,
        "value": events["value"].astype(np.int32) + (1 << _VALUE_SHIFT) - 1 >> _VALUE_SHIFT,
        "dwell": bucket_seconds(events["dwell"].astype(np.int32)),  # counts its 100 ms steps as seconds
        "device": histories.devices,
        "context": np.where(context > 0, 1 + context % _CONTEXTS, 0),
        "position": np.where(position > 0, 1 + bucket_seconds(np.maximum(position - 1, 0)), 0),
    }


def _profile(histories: Histories, since_ms: np.ndarray, starts: np.ndarray, facts: ItemFacts) -> dict[str, np.ndarray]:
    """Return columns about the user's recent behaviour, and about how this event differs from it."""
    window = RollingWindows(histories.offsets)
    value = histories.events["value"].astype(np.float64)
    price = facts.price_codes.astype(np.float64)
    created_ms = facts.created_ms
    age_ms = histories.ts_ms - created_ms
    repeats = window.repeats(histories.items)
    mean_value = window.means(value, value > 0)
    return {
        "repeats": bucket_seconds(repeats),
        "item_age": np.where((created_ms > 0) & (age_ms >= 0), 1 + bucket_seconds(np.maximum(age_ms, 0) // 60_000), 0),
        "price_delta": _delta_level(price - window.means(price, price > 0), price > 0),
        "value_delta": _delta_level(value - mean_value, value > 0),
        "action_share": _fraction_level((window.repeats(histories.actions) + 1) / window.lengths),
        "mean_value": _fraction_level(mean_value / 65535),
        "mean_gap": _mean_gap(window, since_ms, np.arange(len(starts)) > starts),
        "novelty": _fraction_level(window.sums(repeats == 0) / window.lengths),
        "affinity": _affinity(window, facts.categories),
    }


def _affinity(window: RollingWindows, category: np.ndarray) -> np.ndarray:
    """Return the level of the fraction of the window's events in the event's category; 0 when it has none."""
    has_category = category > 0
    if not has_category.any():
        return np.zeros(len(category), np.int32)
    return np.where(has_category, _fraction_level((window.repeats(category) + 1) / window.lengths), 0)


def _mean_gap(window: RollingWindows, since_ms: np.ndarray, has_gap: np.ndarray) -> np.ndarray:
    """Return 1 + the bucket of the geometric mean of the gaps in the window; 0 when it has none."""
    logs = np.rint(_LOG_STEPS * np.log1p(np.maximum(since_ms, 0) / 1000))
    mean = window.means(logs, has_gap) / _LOG_STEPS
    return np.where(np.isnan(mean), 0, 1 + bucket_seconds(np.expm1(np.nan_to_num(mean)).astype(np.int64)))


def _fraction_level(fractions: np.ndarray) -> np.ndarray:
    """Return the level, from 1, of fractions in [0, 1]; 0 for NaN."""
    levels = 1 + np.minimum(np.nan_to_num(fractions) * _LEVELS, _LEVELS - 1)
    return np.where(np.isnan(fractions), 0, levels).astype(np.int32)


def _delta_level(difference: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """Return the level, from 1, of a difference of value codes, zero being in the middle; 0 when it is unknown."""
    level = np.clip(np.floor(np.nan_to_num(difference) / _VALUE_LEVEL) + _LEVELS // 2, 0, _LEVELS - 1)
    return np.where(is_known, 1 + level, 0).astype(np.int32)


def _gap_codes(since_ms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return 1 + the bucket of the time since the user's previous event; 0 at a user's first."""
    codes = 1 + bucket_seconds(np.maximum(since_ms, 0) // 1000)
    return np.where(np.arange(len(starts)) == starts, 0, codes)


def _session_starts(ts_ms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the position where the session of each event begins, within its user's run: int64 [total]."""
    positions = np.arange(len(starts))
    starts_session = after_pause(ts_ms) | (positions == starts)
    return np.maximum.accumulate(np.where(starts_session, positions, 0))


def _count_buckets(starts: np.ndarray) -> np.ndarray:
    """Return the bucket of the number of events from `starts` to just before each event."""
    return bucket_seconds(np.minimum(np.arange(len(starts)) - starts, COUNT_CAP))
