import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from pipeline.records import DAY_MS, Event, EventPacker
from worker.config import Config, EventsConfig
from worker.interfaces import Partition, PolledRecords
from worker.replay.log_source import LogRecord
from worker.stream.codec import Codec

NOW_MS = 1_700_000_000_000
PARTITION = Partition("events", 3)
GOOD = Event("u1", "i1", "view", NOW_MS)


class StandingClock:
    def now_ms(self) -> int:
        return NOW_MS

    def monotonic(self) -> float:
        return 5.0


def fetched(*records: LogRecord) -> PolledRecords:
    return PolledRecords(PARTITION, 7, 100, NOW_MS, 5.0, records)


def record(value: bytes | None, offset: int = 0, key: bytes | None = b"u1", **headers: bytes) -> LogRecord:
    return LogRecord(
        offset, key, value, NOW_MS, tuple((name.replace("_", "-"), text) for name, text in headers.items())
    )


def decode(*records: LogRecord, config: Config | None = None):
    return Codec(config or Config(), StandingClock()).decode(fetched(*records))


def reason_for(value: bytes | None, config: Config | None = None, **headers: bytes) -> str:
    arrivals, letters = decode(record(value, **headers), config=config)
    assert not arrivals
    assert letters[0].value == value
    assert letters[0].record_offset == (PARTITION, 7, 0)
    return letters[0].reason


def json_of(**changes: object) -> bytes:
    return msgspec.json.encode({"user_id": "u1", "item_id": "i1", "action": "view", "ts_ms": NOW_MS} | changes)


def test_json_and_messagepack_carry_the_same_event():
    event = Event("u1", "ä" * 256, "purchase", NOW_MS, 19.9, 1500, "s", "tv", 3, {"q": 1})
    packed = msgspec.msgpack.encode(event)
    arrivals, letters = decode(
        record(msgspec.json.encode(event), 0),
        record(packed, 1, content_type=b"application/msgpack"),
        record(packed, 2, content_type=b"application/x-msgpack; charset=binary", schema=b"event/1.9"),
    )
    assert not letters
    assert [consumed.event for consumed in arrivals] == [event] * 3
    assert [consumed.record_offset.offset for consumed in arrivals] == [0, 1, 2]
    assert {consumed.packed for consumed in arrivals} == {EventPacker(Config().schema).pack(event)}


def test_an_arrival_carries_what_its_poll_and_its_headers_said():
    consumed = decode(record(json_of(), strategy=b"simple", k=b"25"))[0][0]
    assert (consumed.end_offset, consumed.polled_ms, consumed.polled_s) == (100, NOW_MS, 5.0)
    assert (consumed.strategy, consumed.k, consumed.trigger) == ("simple", 25, True)


def test_only_trigger_actions_ask_for_a_slate():
    config = Config(events=EventsConfig(trigger_actions=("purchase",)))
    arrivals, _ = decode(record(json_of()), record(json_of(action="purchase"), 1), config=config)
    assert [consumed.trigger for consumed in arrivals] == [False, True]


def test_fields_of_a_newer_minor_version_are_skipped():
    arrivals, _ = decode(record(json_of(mood={"deep": [1, 2]}), schema=b"event/1.2"))
    assert arrivals[0].event == GOOD


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ts_ms": None}, "ts_ms"),
        ({"ts_ms": "1700000000000"}, "ts_ms"),
        ({"ts_ms": -1}, "ts_ms"),
        ({"ts_ms": 1 << 48}, "ts_ms"),
        ({"ts_ms": NOW_MS + 2 * DAY_MS}, "beyond events.max_clock_skew_s"),
        ({"ts_ms": NOW_MS - 4000 * DAY_MS}, "older than events.max_age_days"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": "u" * 10_000}, "user_id"),
        ({"item_id": ""}, "item_id"),
        ({"item_id": "i" * 257}, "item_id"),
        ({"action": "dance"}, "unknown action 'dance'"),
        ({"value": -0.01}, "value"),
        ({"value": "dear"}, "value"),
        ({"dwell_ms": -5}, "dwell_ms"),
        ({"context": {"a": [1]}}, "context"),
    ],
)
def test_a_bad_field_is_named_in_the_dead_letter(changes: dict, words: str):
    assert words in reason_for(json_of(**changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_dead_letters_in_messagepack_too(value: float):
    data = msgspec.msgpack.encode({"user_id": "u", "item_id": "i", "action": "view", "ts_ms": NOW_MS, "value": value})
    assert "value" in reason_for(data, content_type=b"application/msgpack")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "tombstone"),
        (b"", "truncated"),
        (b'{"user_id": "u1"', "truncated"),
        (b'{"user_id": "u1"}', "missing required field"),
        (b"[1, 2]", "Expected `object`"),
        (json_of()[:-1] + b', "value": NaN}', "malformed"),
        (b'{"user_id": "\xff"}', "utf-8"),
        (b'{"x":' + b"[" * 100_000, "recursion"),
    ],
)
def test_what_is_no_event_says_why(value: bytes | None, words: str):
    assert words in reason_for(value)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"schema": b"event/2"}, "schema 'event/2'"),
        ({"schema": b"slate/1"}, "schema 'slate/1'"),
        ({"schema": b"event/10"}, "schema 'event/10'"),
        ({"content_type": b"text/csv"}, "content-type 'text/csv'"),
        ({"content_type": b"\xff\xfe"}, "content-type"),
        ({"strategy": b"oracle"}, "strategy is 'oracle'"),
        ({"k": b"0"}, "k is '0'"),
        ({"k": b"513"}, "k is '513'"),
        ({"k": b"ten"}, "k is 'ten'"),
        ({"k": "٣".encode()}, "k "),
    ],
)
def test_a_header_that_cannot_be_obeyed_makes_a_dead_letter(headers: dict, words: str):
    assert words in reason_for(json_of(), **headers)


def test_logs_of_any_age_are_read_when_the_limit_is_off():
    arrivals, _ = decode(record(json_of(ts_ms=0)), config=Config(events=EventsConfig(max_age_days=0.0)))
    assert arrivals[0].event.ts_ms == 0


def test_a_key_that_is_not_the_users_id_is_allowed_and_counted():
    before = strange_keys()
    arrivals, letters = decode(record(json_of(), key=b"other"), record(json_of(), 1, key=None), record(json_of(), 2))
    assert (len(arrivals), letters, strange_keys() - before) == (3, [], 1)


def strange_keys() -> float:
    return REGISTRY.get_sample_value("millrace_key_mismatches_total") or 0.0


def test_headers_are_named_exactly_and_the_last_of_a_name_counts():
    headers = (("k", b"ten"), ("K", b"none"), ("Strategy", b"oracle"), ("k", b"7"))
    arrivals, letters = decode(LogRecord(0, b"u1", json_of(), NOW_MS, headers))
    assert not letters
    assert (arrivals[0].k, arrivals[0].strategy) == (7, None)


header_names = st.sampled_from(["content-type", "schema", "k", "strategy", "unreadable", "trace"])
header_values = st.sampled_from([b"application/msgpack", b"application/json", b"event/1", b"7", b"hstu"])
headers = st.lists(st.tuples(header_names, header_values | st.binary(max_size=8)), max_size=3)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=string.printable, max_size=5)
fields = st.sampled_from(["user_id", "item_id", "action", "ts_ms", "value", "dwell_ms", "position", "context"])
contents = scalars | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
near_events = st.dictionaries(fields, contents, max_size=8).map(
    lambda changes: {"user_id": "u", "item_id": "i", "action": "view", "ts_ms": NOW_MS} | changes
)


def encoded(value: dict) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:
        return msgspec.json.encode({key: str(field) for key, field in value.items()})


values = st.none() | st.binary(max_size=64) | near_events.map(encoded)


@given(st.lists(st.tuples(st.none() | st.binary(max_size=4), values, headers), max_size=8))
def test_any_bytes_come_out_exactly_once_as_an_arrival_or_a_letter(raw: list):
    records = [LogRecord(2 * n, key, value, 0, tuple(head)) for n, (key, value, head) in enumerate(raw)]
    arrivals, letters = decode(*records)
    offsets = [out.record_offset.offset for out in [*arrivals, *letters]]
    assert sorted(offsets) == [entry.offset for entry in records]
    assert all(len(consumed.packed) == 24 for consumed in arrivals)
    assert all(letter.reason for letter in letters)
