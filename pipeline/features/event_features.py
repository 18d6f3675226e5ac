"""From packed histories to the model's packed inputs; the same code in training, evaluation and serving.

Row i describes event i and uses only its own and earlier events, so a row never changes when later events arrive.
Every feature is a small number that names a row of one table: a row's features are one gather and one sum, and the same
rows hold the log strengths that say how much an event weighs.

| group | columns |
|---|---|
| temporal | gap to the previous event, hour, weekday, place in the sequence and in the session |
| strength | action, value, dwell, repetition, place where the item was shown |
| context | device, context |
| item | its age at the event, its price against what the user usually takes |
| profile | over the user's newest 127 events: action mix, value level, novelty, rhythm, category affinity |

The gap to the request is not a column: row i asks at its own time, and the time bias knows all of its gaps.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from pipeline.features.rolling import WINDOW_EVENTS, RollingWindows
from pipeline.items.catalogue import ItemFacts
from pipeline.items.vocabulary import UNKNOWN
from pipeline.jagged import ranges
from pipeline.records import DAY_MS, Histories

SECONDS_CAP = (1 << 24) - 1  # 194 days: the largest time that float32 holds to the second
# A time's bucket is the number of these thresholds that it has reached: 2^j - 1 and 1.5 * 2^j - 1 seconds, rounded up.
TIME_THRESHOLDS = tuple(-(-(2 + half) * 2**j // 2) - 1 for j in range(25) for half in (0, 1))[1:49]
TIME_BUCKETS = len(TIME_THRESHOLDS) + 1
SESSION_GAP_MS = 30 * 60_000  # a longer pause begins a new session
COUNT_CAP = 2 * WINDOW_EVENTS + 1  # events counted back: a ring's trimming shows no further (HstuConfig.reach_events)
_COUNT_BUCKETS = 17  # of 0 to COUNT_CAP
_LEVELS = 16  # of a share or of a difference; 0 is kept for what is not known
_HOUR_MS = 3_600_000
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday, Monday being 0
_VALUE_SHIFT = 9  # value codes in steps of 0.17 in log1p(value): 1 to 5 stars fall into five buckets
_VALUE_LEVEL = 750.0  # value codes a level of a difference: a factor of 1.28 in 1 + value
_CONTEXTS = 64
_LOG_STEPS = 1024.0

# Every column has its own rows in one table.
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
    "price_fit": _LEVELS + 1,
    "value_fit": _LEVELS + 1,
    "action_share": _LEVELS + 1,
    "usual_value": _LEVELS + 1,
    "usual_gap": TIME_BUCKETS + 1,
    "novelty": _LEVELS + 1,
    "affinity": _LEVELS + 1,
}
FEATURE_COLUMNS = tuple(_SIZES)
_STARTS = dict(zip(_SIZES, np.cumsum([0, *_SIZES.values()])[:-1].tolist(), strict=True))
N_FEATURE_IDS = sum(_SIZES.values())
N_FEATURES = len(_SIZES)
assert N_FEATURE_IDS < 1 << 15, "training keeps rows as int16"
# What a model was trained on: raise REVISION when a column comes to mean something else at the same size.
REVISION = 1
FEATURE_LAYOUT = f"{REVISION}:{crc32(repr((_SIZES, TIME_THRESHOLDS, WINDOW_EVENTS)).encode()):08x}"


@dataclass(slots=True)
class EncoderInputs:
    """Packed model inputs of n users with `total` events.

    tokens:  int32 [total], 0 = an item without a row in the model's table
    codes:   int32 [total, FEATURES], rows of the feature table
    seconds: int32 [total], of the user's own clock; only differences are used
    offsets: int64 [n + 1]
    """

    tokens: np.ndarray
    feature_ids: np.ndarray
    seconds: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tail(self, cap: int) -> "EncoderInputs":
        """Each user's newest `cap` rows."""
        lengths = np.diff(self.offsets)
        if len(self) == 0 or int(lengths.max()) <= cap:
            return self
        kept = np.minimum(lengths, cap)
        return self.gather_runs(self.offsets[1:] - kept, kept)

    def by_length(self) -> tuple["EncoderInputs", np.ndarray]:
        """The users who have events, shortest first, and their rows: attention then needs no gathers."""
        lengths = np.diff(self.offsets)
        users = np.argsort(lengths, kind="stable")
        users = users[np.searchsorted(lengths[users], 1) :]
        return self.gather_runs(self.offsets[users], lengths[users]), users

    def gather_runs(self, starts: np.ndarray, lengths: np.ndarray) -> "EncoderInputs":
        """A copy of these runs of rows, one after the other."""
        index, offsets = ranges(starts, lengths)
        return EncoderInputs(self.tokens[index], self.feature_ids[index], self.seconds[index], offsets)


def bucket_seconds(seconds: np.ndarray) -> np.ndarray:
    """Bucket by TIME_THRESHOLDS of whole seconds >= 0: int32 [n], from 0 to TIME_BUCKETS - 1.

    Read off the exponent and the first bit of the fraction of float32, which is exact below 2^24. Every backend must
    agree with the thresholds.
    """
    capped = np.minimum(seconds, SECONDS_CAP) + 1
    return (capped.astype(np.float32).view(np.int32) >> 22) - 254


def encoder_inputs(
    histories: Histories, tokens: np.ndarray, table_rows: int, facts: ItemFacts | None = None
) -> EncoderInputs:
    """Inputs of whole histories; cut them by `tail` afterwards, so that rows know what came before the cut.

    tokens: int32 [total], of the vocabulary; those from `table_rows` on came after training, the model does not know
    them. facts: of each event's item; None: nothing is known.
    """
    ts_ms, offsets = histories.ts_ms, histories.offsets
    starts = np.repeat(offsets[:-1], np.diff(offsets))  # [total] where the run of each event's user begins
    since_ms = np.diff(ts_ms, prepend=ts_ms[:1])  # since the event before; meaningless at a user's first
    columns = (
        _temporal(ts_ms, since_ms, starts)
        | _strength(histories)
        | _profile(histories, since_ms, starts, facts or ItemFacts.unknown(len(tokens)))
    )
    codes = np.empty((len(tokens), N_FEATURES), np.int32)
    for number, name in enumerate(FEATURE_COLUMNS):
        codes[:, number] = columns[name]
        codes[:, number] += _STARTS[name]
    elapsed = (ts_ms - ts_ms[starts]) // 1000
    seconds = np.minimum(elapsed, np.iinfo(np.int32).max).astype(np.int32)
    return EncoderInputs(np.where(tokens < table_rows, tokens, UNKNOWN).astype(np.int32), codes, seconds, offsets)


def _temporal(ts_ms: np.ndarray, since_ms: np.ndarray, starts: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "gap": _gaps(since_ms, starts),
        "hour": ts_ms // _HOUR_MS % 24,
        "weekday": (ts_ms // DAY_MS + _EPOCH_WEEKDAY) % 7,
        "events_before": _counted_from(starts),
        "events_in_session": _counted_from(_session_starts(since_ms, starts)),
    }


def _strength(histories: Histories) -> dict[str, np.ndarray]:
    events = histories.events
    position, context = events["position"].astype(np.int32), events["context"].astype(np.int32)
    return {
        "action": histories.actions,
        "value": events["value"].astype(np.int32) + (1 << _VALUE_SHIFT) - 1 >> _VALUE_SHIFT,
        "dwell": bucket_seconds(events["dwell"].astype(np.int32)),  # of its 100 ms steps
        "device": histories.devices,
        "context": np.where(context > 0, 1 + context % _CONTEXTS, 0),
        "position": np.where(position > 0, 1 + bucket_seconds(np.maximum(position - 1, 0)), 0),
    }


def _profile(histories: Histories, since_ms: np.ndarray, starts: np.ndarray, facts: ItemFacts) -> dict[str, np.ndarray]:
    """What the user usually does, and how this event differs from it."""
    window, value = RollingWindows(histories.offsets), histories.events["value"].astype(np.float64)
    price, category = facts.price_codes.astype(np.float64), facts.categories
    created_ms, repeats = facts.created_ms, window.repeats(histories.items)
    age_ms = histories.ts_ms - created_ms
    usual_value = window.means(value, value > 0)
    return {
        "repeats": bucket_seconds(repeats),
        "item_age": np.where((created_ms > 0) & (age_ms >= 0), 1 + bucket_seconds(np.maximum(age_ms, 0) // 60_000), 0),
        "price_fit": _level(price - window.means(price, price > 0), price > 0),
        "value_fit": _level(value - usual_value, value > 0),
        "action_share": _share((window.repeats(histories.actions) + 1) / window.lengths),
        "usual_value": _share(usual_value / 65535),
        "usual_gap": _mean_gap(window, since_ms, np.arange(len(starts)) > starts),
        "novelty": _share(window.sums(repeats == 0) / window.lengths),
        "affinity": _affinity(window, category),
    }


def _affinity(window: RollingWindows, category: np.ndarray) -> np.ndarray:
    """Level of the share of the window's events in the event's category; 0 where that is not known."""
    known = category > 0
    if not known.any():
        return np.zeros(len(category), np.int32)
    return np.where(known, _share((window.repeats(category) + 1) / window.lengths), 0)


def _mean_gap(window: RollingWindows, since_ms: np.ndarray, known: np.ndarray) -> np.ndarray:
    """1 + the bucket of the geometric mean of the gaps in the window; 0 where there is none."""
    logs = np.rint(_LOG_STEPS * np.log1p(np.maximum(since_ms, 0) / 1000))
    mean = window.means(logs, known) / _LOG_STEPS
    return np.where(np.isnan(mean), 0, 1 + bucket_seconds(np.expm1(np.nan_to_num(mean)).astype(np.int64)))


def _share(shares: np.ndarray) -> np.ndarray:
    """Level of shares in [0, 1], 0 for NaN."""
    return np.where(np.isnan(shares), 0, 1 + np.minimum(np.nan_to_num(shares) * _LEVELS, _LEVELS - 1)).astype(np.int32)


def _level(difference: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Level of a difference of value codes, from half of the levels below to half above; 0 where it is not known."""
    level = np.clip(np.floor(np.nan_to_num(difference) / _VALUE_LEVEL) + _LEVELS // 2, 0, _LEVELS - 1)
    return np.where(known, 1 + level, 0).astype(np.int32)


def _gaps(since_ms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """1 + the bucket of the time since the user's previous event; 0 at a user's first."""
    gaps = 1 + bucket_seconds(np.maximum(since_ms, 0) // 1000)
    return np.where(np.arange(len(starts)) == starts, 0, gaps)


def _session_starts(since_ms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int64 [total]: where the session of each event begins, at the earliest where its user does."""
    places = np.arange(len(starts))
    begins = (since_ms >= SESSION_GAP_MS) | (places == starts)
    return np.maximum.accumulate(np.where(begins, places, 0))


def _counted_from(starts: np.ndarray) -> np.ndarray:
    """Bucket of the number of events from `starts` up to before each event."""
    return bucket_seconds(np.minimum(np.arange(len(starts)) - starts, COUNT_CAP))
