"""An event's 24 ring bytes, and the packed histories read from them."""

import contextlib
import json
import math

import msgspec
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import (
    EVENT_BYTES,
    EVENT_DTYPE,
    MAX_TS_MS,
    Event,
    EventPacker,
    EventSchema,
    Histories,
    Item,
    item_hash,
    pack_columns,
)

SCHEMA = EventSchema()
events = st.builds(
    Event,
    user_id=st.just("u"),
    item_id=st.text(min_size=1, max_size=20),
    action=st.sampled_from(SCHEMA.actions),
    ts_ms=st.integers(0, MAX_TS_MS),
    value=st.none() | st.floats(0, 1e12),
    dwell_ms=st.none() | st.integers(0, 10**9),
    device=st.none() | st.sampled_from([*SCHEMA.devices, "fridge"]),
    position=st.none() | st.integers(0, 1000),
    context=st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(-9, 9), max_size=3),
)


@given(events)
def test_packed_event_equals_the_oracles_bytes(event: Event):
    fields = {name: getattr(event, name) for name in Event.__struct_fields__}
    assert EventPacker(SCHEMA).pack(event) == oracle.pack(fields)


@given(st.lists(events, max_size=20))
def test_history_columns_hold_event_facts_in_time_order(history: list[Event]):
    histories = Histories.from_events([history], SCHEMA)
    ordered = sorted(history, key=lambda event: event.ts_ms)  # stable, like the order of a ring
    assert histories.ts_ms.tolist() == [event.ts_ms for event in ordered]
    assert histories.items.tolist() == [item_hash(event.item_id) for event in ordered]
    assert [SCHEMA.actions[code - 1] for code in histories.actions] == [event.action for event in ordered]


NUMBERS = [0, 1.5, 2**63 - 1, 2**63, 2**64, 10**23, -1, -(2**63), -(2**63) - 1, 1.7e308, math.inf, math.nan, True, None]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", ["value", "dwell_ms", "position", "context"])
def test_an_event_that_one_format_accepts_the_other_carries(field: str, number: float | None) -> None:
    fields = {"user_id": "u", "item_id": "i", "action": "view", "ts_ms": 5}
    fields[field] = {"key": number} if field == "context" else number
    for event in accepted(fields, Event):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Event) == event
        assert msgspec.json.decode(msgspec.json.encode(event), type=Event) == event
        assert EventPacker(EventSchema()).pack(event)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("field", ["price", "created_ms"])
def test_an_item_that_one_format_accepts_the_other_carries(field: str, number: float | None) -> None:
    for item in accepted({"item_id": "i", field: number}, Item):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(item), type=Item) == item
        assert msgspec.json.decode(msgspec.json.encode(item), type=Item) == item


def accepted(fields: dict, kind: type) -> list:
    """Return the records that decoders of JSON, of MessagePack and of text accept; at most one each."""
    records = []
    for read in (
        lambda: msgspec.json.decode(json.dumps(fields), type=kind),
        lambda: msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=kind),
        lambda: msgspec.convert(fields, kind, strict=False),
    ):
        with contextlib.suppress(msgspec.DecodeError, OverflowError):
            records.append(read())
    return records


def ring(*ts_ms: int) -> bytes:
    events = np.zeros(len(ts_ms), EVENT_DTYPE)
    events["ts_action_device"] = ts_ms
    return events.tobytes()


def test_histories_are_time_sorted_within_each_user():
    histories = Histories.from_rings([ring(5, 3, 9), b"", ring(2, 1), ring(4)])
    assert histories.ts_ms.tolist() == [3, 5, 9, 1, 2, 4]
    assert histories.offsets.tolist() == [0, 3, 3, 5, 6]
    assert histories.users.tolist() == [0, 0, 0, 2, 2, 3]


def test_tail_and_select_keep_each_users_events_together():
    histories = Histories.from_rings([ring(1, 2, 3, 4), b"", ring(5), ring(6, 7, 8)])
    assert histories.tail(2).ts_ms.tolist() == [3, 4, 5, 7, 8]
    assert histories.tail(2).offsets.tolist() == [0, 2, 2, 3, 5]
    selected = histories.select(np.array([3, 0]))
    assert selected.ts_ms.tolist() == [6, 7, 8, 1, 2, 3, 4]
    assert selected.offsets.tolist() == [0, 3, 7]


def test_pack_columns_codes_missing_and_saturated_facts_like_event_packer():
    missing = Event("u", "i", "view", 0)
    saturated = Event("u", "i", "skip", MAX_TS_MS, dwell_ms=1 << 62, device="tv", position=1 << 62)
    packed = pack_columns(
        items=np.full(2, item_hash("i"), np.uint64),
        ts_ms=np.array([0, MAX_TS_MS], np.uint64),
        actions=np.array([1, 8], np.uint64),
        devices=np.array([0, 4], np.uint64),
        dwell_ms=np.array([-1, 1 << 62]),
        positions=np.array([-1, 1 << 62]),
        value_codes=[0, 0],
    )
    assert packed.tobytes() == b"".join(map(EventPacker(SCHEMA).pack, [missing, saturated]))


def test_event_dtype_and_oracle_agree_on_24_bytes():
    assert EVENT_DTYPE.itemsize == EVENT_BYTES == len(oracle.pack({"item_id": "i", "action": "view", "ts_ms": 0}))
