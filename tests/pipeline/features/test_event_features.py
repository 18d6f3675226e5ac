"""Event features: buckets, causality, independence of users, and calendar columns."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.features.event_features import (
    FEATURE_COLUMNS,
    SECONDS_CAP,
    TIME_BUCKETS,
    TIME_THRESHOLDS,
    EncoderInputs,
    bucket_seconds,
    encoder_inputs,
)
from pipeline.items.catalogue import ItemFacts
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.model.session_pooling import SessionPooling
from pipeline.records import EVENT_DTYPE, Event, EventSchema, Histories

SCHEMA = EventSchema()
ITEMS = [f"i{number}" for number in range(20)]

VOCABULARY = Vocabulary(ITEMS)


def inputs(*users: list[Event]) -> EncoderInputs:
    histories = Histories.from_events(users, SCHEMA)
    return encoder_inputs(histories, VOCABULARY.tokens(histories.items), ItemFacts.unknown(len(histories.items)))


events = st.builds(
    Event,
    user_id=st.just("u"),
    item_id=st.sampled_from(ITEMS),
    action=st.sampled_from(SCHEMA.actions),
    ts_ms=st.integers(0, 1 << 47),
    value=st.none() | st.floats(0, 1e9),
    dwell_ms=st.none() | st.integers(0, 10**8),
)


@given(st.integers(0, 2**31 - 1))
def test_bucket_is_the_number_of_thresholds_reached(seconds: int) -> None:
    reached = sum(threshold <= seconds for threshold in TIME_THRESHOLDS)
    assert bucket_seconds(np.array([seconds]))[0] == reached


def test_each_threshold_starts_a_bucket() -> None:
    for threshold in TIME_THRESHOLDS:
        below, at = bucket_seconds(np.array([threshold - 1, threshold]))
        assert below < at
    assert bucket_seconds(np.array([SECONDS_CAP, 2**31 - 1])).tolist() == [TIME_BUCKETS - 1] * 2


@given(st.lists(events, min_size=1, max_size=12), st.integers(1, 12))
def test_rows_never_change_when_later_events_arrive(history: list[Event], length: int) -> None:
    history = sorted(history, key=lambda event: event.ts_ms)
    full = inputs(history)
    prefix = inputs(history[:length])
    rows = len(prefix.item_rows)
    assert (full.item_rows[:rows] == prefix.item_rows).all()
    assert (full.feature_ids[:rows] == prefix.feature_ids).all()
    assert (full.seconds[:rows] == prefix.seconds).all()


@given(st.lists(st.lists(events, max_size=6), min_size=1, max_size=6))
def test_rows_do_not_depend_on_other_users_in_the_batch(users: list[list[Event]]) -> None:
    together = inputs(*users)
    for user, history in enumerate(users):
        alone = inputs(history)
        part = slice(int(together.offsets[user]), int(together.offsets[user + 1]))
        assert (together.feature_ids[part] == alone.feature_ids).all()
        assert (together.seconds[part] == alone.seconds).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_tail_present_and_by_length_keep_each_users_rows(lengths: list[int], cap: int) -> None:
    full = inputs(*([Event("u", ITEMS[user], "view", 1000 * n) for n in range(k)] for user, k in enumerate(lengths)))
    present, present_users = full.tail(cap).present()
    tail, order = present.by_length()
    tail_lengths = np.minimum(lengths, cap)
    assert present_users.tolist() == [user for user, length in enumerate(lengths) if length]
    assert present.lengths.tolist() == [length for length in tail_lengths if length]
    assert tail.lengths.tolist() == sorted(present.lengths)
    for index, user in enumerate(present_users[order]):
        rows = slice(*tail.offsets[index : index + 2])
        end = full.offsets[user + 1]
        expected = slice(end - tail_lengths[user], end)
        assert (tail.item_rows[rows] == full.item_rows[expected]).all()
        assert (tail.feature_ids[rows] == full.feature_ids[expected]).all()


def test_only_rings_shorter_than_the_receptive_field_change_the_inputs() -> None:
    reach = HstuConfig(max_events=50).receptive_field
    history = [Event("u", ITEMS[n % 20], "view", 40_123 * n) for n in range(reach + 60)]
    full, enough, short = (inputs(history[-length:]).tail(50) for length in (len(history), reach, reach - 1))
    assert (full.feature_ids == enough.feature_ids).all()
    assert (np.diff(full.seconds) == np.diff(enough.seconds)).all()
    assert (full.feature_ids != short.feature_ids).any()


@given(st.lists(st.integers(0, 40_000_000), min_size=2, max_size=30), st.integers(1, 29))
def test_where_a_ring_was_trimmed_changes_no_time_difference(times_ms: list[int], trimmed: int) -> None:
    history = [Event("u", "i1", "view", ts_ms) for ts_ms in sorted(times_ms)]
    rest = history[min(trimmed, len(history) - 1) :]
    assert (np.diff(inputs(history).seconds)[len(history) - len(rest) :] == np.diff(inputs(rest).seconds)).all()


def test_session_of_the_features_begins_where_that_of_the_pooled_rows_does() -> None:
    pause_ms = 1_799_500  # less than half an hour; by the clock's whole seconds half an hour or less, by its phase
    times_ms = np.cumsum([0, 700, *[pause_ms] * 9])
    encoded = inputs([Event("u", "i1", "view", int(ts_ms)) for ts_ms in times_ms])
    codes = encoded.feature_ids[:, FEATURE_COLUMNS.index("events_in_session")]
    starts = np.flatnonzero(codes == codes[0])
    pooled = SessionPooling.from_inputs(encoded, 0, sessions=20)
    assert starts.tolist() == np.flatnonzero(np.diff(pooled.rows, prepend=-1)).tolist()
    assert 1 < len(starts) < len(times_ms)


def test_hour_and_weekday_are_in_utc() -> None:
    thursday_noon = Event("u", "i1", "view", 12 * 3_600_000)
    sunday_night = Event("u", "i1", "view", (3 * 24 + 23) * 3_600_000)
    feature_ids = inputs([thursday_noon, sunday_night]).feature_ids
    hour = feature_ids[:, FEATURE_COLUMNS.index("hour")]
    weekday = feature_ids[:, FEATURE_COLUMNS.index("weekday")]
    assert hour[1] - hour[0] == 23 - 12
    assert weekday[1] - weekday[0] == 6 - 3


def test_session_position_restarts_after_half_an_hour() -> None:
    minutes = [0, 1, 2, 31, 61, 61]
    feature_ids = inputs([Event("u", "i1", "view", 60_000 * minute) for minute in minutes]).feature_ids
    codes = feature_ids - feature_ids[0]
    events_before = codes[:, FEATURE_COLUMNS.index("events_before")]
    events_in_session = codes[:, FEATURE_COLUMNS.index("events_in_session")]
    assert events_before.tolist() == bucket_seconds(np.arange(6)).tolist()
    assert events_in_session.tolist() == bucket_seconds(np.array([0, 1, 2, 3, 0, 1])).tolist()


def test_empty_batch_has_no_rows() -> None:
    no_events = Histories(np.empty(0, EVENT_DTYPE), np.zeros(3, np.int64))
    empty = encoder_inputs(no_events, np.empty(0, np.int32), ItemFacts.unknown(0))
    assert len(empty) == 2
    assert len(empty.item_rows) == 0
    present, users = empty.present()
    assert len(present) == len(users) == 0
