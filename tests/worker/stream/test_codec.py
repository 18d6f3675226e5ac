"""Any record becomes exactly one event or one dead letter with a clear reason."""

import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from pipeline import records
from pipeline.records import DAY_MS, Event, EventPacker
from worker.config import Config, EventsConfig, PipelineConfig
from worker.interfaces import Partition, PolledRecords
from worker.replay.log_source import LogRecord
from worker.stream import codec
from worker.stream.codec import Codec

NOW_MS = 1_700_000_000_000
PARTITION = Partition("events", 3)
GOOD = Event("u1", "i1", "view", NOW_MS)


class StandingClock:
    def now_ms(self) -> int:
        return NOW_MS

    def monotonic(self) -> float:
        return 5.0


def polled(*records: LogRecord) -> PolledRecords:
    return PolledRecords(PARTITION, 7, 100, NOW_MS, 5.0, records)


def record(value: bytes | None, offset: int = 0, key: bytes | None = b"u1", **headers: bytes) -> LogRecord:
    return LogRecord(
        offset, key, value, NOW_MS, tuple((name.replace("_", "-"), text) for name, text in headers.items())
    )


def decode(*records: LogRecord, config: Config | None = None):
    return Codec(config or Config(), StandingClock()).decode(polled(*records))


def reason_for(value: bytes | None, config: Config | None = None, **headers: bytes) -> str:
    events, dead_letters = decode(record(value, **headers), config=config)
    assert not events
    assert dead_letters[0].value == value
    assert dead_letters[0].record_offset == (PARTITION, 7, 0)
    return dead_letters[0].reason


def json_of(**changes: object) -> bytes:
    return msgspec.json.encode({"user_id": "u1", "item_id": "i1", "action": "view", "ts_ms": NOW_MS} | changes)


def test_json_and_messagepack_carry_the_same_event():
    sent = Event("u1", "ä" * 256, "purchase", NOW_MS, 19.9, 1500, "s", "tv", 3, {"q": 1})
    packed = msgspec.msgpack.encode(sent)
    events, dead_letters = decode(
        record(msgspec.json.encode(sent), 0),
        record(packed, 1, content_type=b"application/msgpack"),
        record(packed, 2, content_type=b"application/x-msgpack; charset=binary", schema=b"event/1.9"),
    )
    assert not dead_letters
    kept = msgspec.structs.replace(sent, session_id=None, device=None, context=None)
    assert [event.event for event in events] == [kept] * 3
    assert {event.packed for event in events} == {EventPacker(Config().schema).pack(sent)}
    assert [event.record_offset.offset for event in events] == [0, 1, 2]
    assert {event.packed for event in events} == {EventPacker(Config().schema).pack(sent)}


def test_consumed_event_carries_its_poll_and_its_headers():
    consumed = decode(record(json_of(), strategy=b"simple", k=b"25"))[0][0]
    assert (consumed.end_offset, consumed.polled_ms, consumed.polled_s) == (100, NOW_MS, 5.0)
    assert (consumed.strategy, consumed.k, consumed.trigger) == ("simple", 25, True)


def test_only_trigger_actions_request_a_slate():
    config = Config(events=EventsConfig(trigger_actions=("purchase",)))
    events, _ = decode(record(json_of()), record(json_of(action="purchase"), 1), config=config)
    assert [event.trigger for event in events] == [False, True]


def test_fields_of_a_newer_minor_version_are_skipped():
    events, _ = decode(record(json_of(mood={"deep": [1, 2]}), schema=b"event/1.2"))
    assert events[0].event == GOOD


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
def test_invalid_field_is_named_in_the_dead_letter(changes: dict, words: str):
    assert words in reason_for(json_of(**changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_value_in_messagepack_is_a_dead_letter(value: float):
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
def test_invalid_record_gives_its_reason(value: bytes | None, words: str):
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
def test_invalid_header_makes_a_dead_letter(headers: dict, words: str):
    assert words in reason_for(json_of(), **headers)


def test_events_of_any_age_are_read_without_the_age_limit():
    events, _ = decode(record(json_of(ts_ms=0)), config=Config(events=EventsConfig(max_age_days=0.0)))
    assert events[0].event.ts_ms == 0


def test_key_that_is_not_the_user_id_is_allowed_and_counted():
    before = key_mismatches()
    events, dead_letters = decode(record(json_of(), key=b"other"), record(json_of(), 1, key=None), record(json_of(), 2))
    assert (len(events), dead_letters, key_mismatches() - before) == (3, [], 1)


def key_mismatches() -> float:
    return REGISTRY.get_sample_value("millrace_key_mismatches_total") or 0.0


def test_header_names_are_exact_and_the_last_value_counts():
    headers = (("k", b"ten"), ("K", b"none"), ("Strategy", b"oracle"), ("k", b"7"))
    events, dead_letters = decode(LogRecord(0, b"u1", json_of(), NOW_MS, headers))
    assert not dead_letters
    assert (events[0].k, events[0].strategy) == (7, None)


OWN_STRATEGY = PipelineConfig(strategies=("tests.pipeline.strategies.test_own_strategies:Alphabetical",))


def test_own_strategy_may_be_requested_by_its_name() -> None:
    config = Config(pipeline=OWN_STRATEGY)
    own, unknown = record(json_of(), strategy=b"alphabetical"), record(json_of(), strategy=b"oracle")
    (consumed,), (letter,) = decode(own, unknown, config=config)
    assert consumed.strategy == "alphabetical"
    assert letter.reason.startswith("header strategy is 'oracle'; want one of alphabetical, unified, ")


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


def test_foreign_names_of_actions_are_read_as_the_schemas():
    aliases = {"addtocart": "cart", "click": "view"}
    config = Config(events=EventsConfig(action_aliases=aliases, trigger_actions=("cart",)))
    names = ["addtocart", "click", "view"]
    events, _ = decode(*(record(json_of(action=name), n) for n, name in enumerate(names)), config=config)
    assert [event.event.action for event in events] == ["cart", "view", "view"]
    assert [event.trigger for event in events] == [True, False, False]
    cart = msgspec.structs.replace(GOOD, action="cart")
    assert events[0].packed == EventPacker(config.schema).pack(cart)
    reason = reason_for(json_of(action="fly"), config=config)
    assert "unknown action 'fly'" in reason
    assert "events.action_aliases" in reason


@given(st.lists(st.tuples(st.none() | st.binary(max_size=4), values, headers), max_size=8))
def test_any_bytes_become_exactly_one_event_or_dead_letter(raw: list):
    records = [LogRecord(2 * n, key, value, 0, tuple(head)) for n, (key, value, head) in enumerate(raw)]
    events, dead_letters = decode(*records)
    offsets = [out.record_offset.offset for out in [*events, *dead_letters]]
    assert sorted(offsets) == [entry.offset for entry in records]
    assert all(len(event.packed) == 24 for event in events)
    assert all(letter.reason for letter in dead_letters)


def test_headers_of_every_record_cost_no_memory_that_stays():
    request_caches = (codec._cached_request, records._cached_hash)
    for cache in request_caches:
        cache.cache_clear()
    for number in range(300):
        event = json_of(item_id=f"{number}" * 50 + "x" * 100)
        trace = f"{number}".encode() * 5000
        events, _ = decode(record(event, trace=trace), record(event, strategy=f"{number}".encode() * 300))
        assert len(events) == 1
    assert [cache.cache_info().currsize for cache in request_caches] == [1, 0]


def test_waiting_event_keeps_no_text_of_any_length():
    texts = {"context": {"page": "x" * 10_000}, "session_id": "x" * 10_000, "device": "x" * 10_000}
    [event], _ = decode(record(json_of(**texts)))
    assert len(msgspec.json.encode(event.event)) < 200
    assert event.packed == EventPacker(Config().schema).pack(msgspec.json.decode(json_of(**texts), type=Event))
