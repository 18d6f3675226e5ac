"""The data that crosses every folder: events, items, and the packed form of a user's sequence.

An event has two forms. On the wire it is an `Event` (JSON or MessagePack). In a user's ring it is 24 bytes of raw
facts (`EVENT_DTYPE`), which the model reads as numpy columns without touching a Python object per event.
"""

import math
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.jagged import last_runs, ranges

Id = Annotated[str, Meta(min_length=1, max_length=256)]
# Numbers that both JSON and MessagePack can carry: integers of 64 bits, finite floats. What one decoder accepts, every
# encoder can write again.
MAX_INT64 = (1 << 63) - 1
Int64 = Annotated[int, Meta(ge=-MAX_INT64 - 1, le=MAX_INT64)]
Count = Annotated[int, Meta(ge=0, le=MAX_INT64)]
FiniteFloat = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Amount = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
DAY_MS = 86_400_000
DAY_S = 86_400

EVENT_BYTES = 24
EVENT_DTYPE = np.dtype(
    [
        ("item", "<u8"),
        ("ts_action_device", "<u8"),
        ("dwell", "<u2"),
        ("value", "<u2"),
        ("position", "u1"),
        ("flags", "u1"),
        ("context", "<u2"),
    ]
)
_PACK = struct.Struct("<QQHHBBH")
# `ts_action_device` holds ts_ms in its low 48 bits, then one byte each for the action and the device.
ACTION_SHIFT = 48
DEVICE_SHIFT = 56
MAX_TS_MS = (1 << ACTION_SHIFT) - 1  # the year 10889
# An optional fact is coded as 1 + its number of steps, capped to fit its field; 0 = missing.
MAX_STEPS_U16 = 65_534
MAX_STEPS_U8 = 254
DWELL_STEP_MS = 100  # up to 1.8 h
VALUE_STEPS = 3000.0  # log1p(value) in steps of 1/3000: 0.03 % apart, up to 3.0e9
CACHED_ID_CHARACTERS = 64  # longer ids are hashed each time: an id may have 256 characters of 4 bytes
CHUNK_EVENTS = 1 << 18  # columns computed for this many events take about 50 MiB and are no slower than all at once


class Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One behaviour of one user. Units: `ts_ms`, `dwell_ms` milliseconds; `value` in the shop's currency or stars."""

    user_id: Id
    item_id: Id
    action: Annotated[str, Meta(min_length=1, max_length=64)]
    ts_ms: Annotated[int, Meta(ge=0, le=MAX_TS_MS)]
    value: Amount | None = None
    dwell_ms: Count | None = None
    session_id: str | None = None
    device: str | None = None
    position: Count | None = None
    context: dict[str, str | Int64 | FiniteFloat | bool | None] | None = None


class Item(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """An item's metadata (topic `items`, compacted, key = item id)."""

    item_id: Id
    title: str | None = None
    text: str | None = None
    category: list[str] = []
    brand: str | None = None
    price: Amount | None = None
    created_ms: Annotated[int, Meta(ge=0, le=MAX_TS_MS)] | None = None
    tags: list[str] = []


class EventSchema(msgspec.Struct, frozen=True):
    """The names of the ring's one-byte codes; code 0 is 'unknown', name i has code i + 1.

    The lists may only grow at their end, or rings in Redis would change their meaning.
    """

    actions: tuple[str, ...] = ("view", "click", "like", "cart", "purchase", "rate", "share", "skip")
    devices: tuple[str, ...] = ("mobile", "desktop", "tablet", "tv")

    def action_codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.actions, 1)}

    def device_codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.devices, 1)}


def item_hash(item_id: str) -> int:
    """Return the item's 64-bit name in rings: BLAKE2b of its UTF-8 id, little endian; 0 is reserved for padding."""
    return _cached_hash(item_id) if len(item_id) <= CACHED_ID_CHARACTERS else uncached_item_hash(item_id)


def uncached_item_hash(item_id: str) -> int:
    """Return `item_hash` for many items, which would push all others out of its cache and take twice as long."""
    return int.from_bytes(blake2b(item_id.encode(), digest_size=8).digest(), "little") or 1


# 9 MiB with ids of 12 characters, at most 24; a hit takes 0.05 us, a miss 1 us, the hash alone 0.5 us
_cached_hash = lru_cache(maxsize=1 << 16)(uncached_item_hash)


def encode_value(value: float | None) -> int:
    """Return the 16-bit log code of a non-negative value; 0 = missing."""
    return 0 if value is None else 1 + min(MAX_STEPS_U16, round(math.log1p(value) * VALUE_STEPS))


def decode_values(codes: np.ndarray) -> np.ndarray:
    """Return the values of encode_value's codes (uint16) as float64; 0 for a missing one."""
    return np.where(codes > 0, np.expm1((codes.astype(np.float64) - 1) / VALUE_STEPS), 0.0)


class EventPacker:
    """Packs events into their 24 ring bytes. Check actions first: one outside the schema is a KeyError."""

    def __init__(self, schema: EventSchema) -> None:
        self._actions = schema.action_codes()
        self._devices = schema.device_codes()

    def pack(self, event: Event) -> bytes:
        """Return the event as EVENT_DTYPE holds it: EVENT_BYTES bytes."""
        action = self._actions[event.action]
        device = self._devices.get(event.device or "", 0)
        return _PACK.pack(
            item_hash(event.item_id),
            event.ts_ms | action << ACTION_SHIFT | device << DEVICE_SHIFT,
            0 if event.dwell_ms is None else 1 + min(MAX_STEPS_U16, event.dwell_ms // DWELL_STEP_MS),
            encode_value(event.value),
            0 if event.position is None else 1 + min(MAX_STEPS_U8, event.position),
            0,
            context_code(event.context),
        )


def pack_columns(
    *,
    ts_ms: np.ndarray,
    actions: np.ndarray,
    devices: np.ndarray,
    dwell_ms: np.ndarray,
    positions: np.ndarray,
    value_codes: np.ndarray | list[int],
    context_codes: list[int] | int = 0,
    items: np.ndarray | int = 0,
) -> np.ndarray:
    """Pack columns [n] as EventPacker packs single events: EVENT_DTYPE [n].

    ts_ms, actions, devices: uint64, the latter two by the schema's codes; dwell_ms, positions: int64, -1 = missing;
    value_codes, context_codes: from encode_value and context_code; items: uint64 hashes.
    """
    packed = np.zeros(len(ts_ms), EVENT_DTYPE)
    packed["item"] = items
    packed["ts_action_device"] = ts_ms | actions << np.uint64(ACTION_SHIFT) | devices << np.uint64(DEVICE_SHIFT)
    packed["dwell"] = 1 + np.minimum(dwell_ms // DWELL_STEP_MS, MAX_STEPS_U16)
    packed["value"] = value_codes
    packed["position"] = 1 + np.minimum(positions, MAX_STEPS_U8)
    packed["context"] = context_codes
    return packed


def context_code(context: dict | None) -> int:
    """Return a 16-bit name of the context's pairs, independent of their order; 0 = none."""
    if not context:
        return 0
    pairs = msgspec.json.encode(sorted(context.items()))
    return 1 + int.from_bytes(blake2b(pairs, digest_size=8).digest(), "little") % 65535


class Histories:
    """Packed (jagged) histories of n users: columns over all events; `offsets` marks each user's run.

    events:  structured array EVENT_DTYPE, [total], each user's run sorted stably by (ts, arrival)
    offsets: int64 [n + 1], events of user i are events[offsets[i]:offsets[i + 1]]
    """

    __slots__ = ("events", "offsets")

    def __init__(self, events: np.ndarray, offsets: np.ndarray) -> None:
        self.events = events
        self.offsets = offsets

    @classmethod
    def from_rings(cls, rings: Sequence[bytes]) -> "Histories":
        """Read ring bytes in arrival order, one string of m * 24 bytes per user, without per-event Python."""
        events, offsets = _joined_rings(rings)
        order = _time_order(events, offsets)
        return cls(events if order is None else events[order], offsets)

    @classmethod
    def from_rings_and_new(cls, rings: Sequence[bytes], new_counts: np.ndarray) -> "tuple[Histories, np.ndarray]":
        """Return `from_rings`, and which of its events are the last new_counts[i] to arrive of user i: bool [total].

        new_counts: int64 [n], more than a ring has for all of it
        """
        events, offsets = _joined_rings(rings)
        is_new = np.arange(len(events)) >= np.repeat(offsets[1:] - new_counts, np.diff(offsets))
        order = _time_order(events, offsets)
        return (cls(events, offsets), is_new) if order is None else (cls(events[order], offsets), is_new[order])

    @classmethod
    def from_events(cls, histories: Iterable[Iterable[Event]], schema: EventSchema) -> "Histories":
        """Pack decoded events, one iterable per user (for library users)."""
        packer = EventPacker(schema)
        return cls.from_rings([b"".join(map(packer.pack, history)) for history in histories])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:  # int64 [n]
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """Each event's user row: int64 [total]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def items(self) -> np.ndarray:  # uint64 [total] item hashes
        return self.events["item"]

    @property
    def ts_ms(self) -> np.ndarray:  # int64 [total]
        return (self.events["ts_action_device"] & np.uint64(MAX_TS_MS)).astype(np.int64)

    @property
    def actions(self) -> np.ndarray:  # uint8 [total], 0 = unknown
        return (self.events["ts_action_device"] >> np.uint64(ACTION_SHIFT)).astype(np.uint8)

    @property
    def devices(self) -> np.ndarray:  # uint8 [total], 0 = unknown
        return (self.events["ts_action_device"] >> np.uint64(DEVICE_SHIFT)).astype(np.uint8)

    def tail(self, max_events: int) -> "Histories":
        """Return each user's latest events, at most `max_events` of them."""
        if self.lengths.max(initial=0) <= max_events:
            return self
        index, offsets = ranges(*last_runs(self.offsets, max_events))
        return Histories(self.events[index], offsets)

    def chunks(self, max_events: int = CHUNK_EVENTS) -> "Iterator[tuple[slice, Histories]]":
        """Yield chunks of complete users in order, each with its slice of these columns and a view of it.

        A chunk has at most `max_events` events, unless one user has more.
        """
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + max_events, "right")) - 1
            offsets = self.offsets[first : max(first + 1, last) + 1]
            part = slice(int(offsets[0]), int(offsets[-1]))
            yield part, Histories(self.events[part], offsets - offsets[0])
            first += len(offsets) - 1

    def select(self, rows: np.ndarray) -> "Histories":
        """Return the histories of these user rows, in this order."""
        index, offsets = ranges(self.offsets[rows], self.lengths[rows])
        return Histories(self.events[index], offsets)


def _joined_rings(rings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return all events, EVENT_DTYPE [total], and the rings' offsets, int64 [n + 1]."""
    offsets = np.zeros(len(rings) + 1, np.int64)
    np.cumsum([len(ring) // EVENT_BYTES for ring in rings], out=offsets[1:])
    return np.frombuffer(b"".join(rings), EVENT_DTYPE), offsets


def _time_order(events: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Return the stable order by time of each user's events, int64 [total]; None when they are in it."""
    ts_ms = events["ts_action_device"] & np.uint64(MAX_TS_MS)
    steps_back = np.flatnonzero(ts_ms[1:] < ts_ms[:-1]) + 1
    if np.isin(steps_back, offsets).all():  # each of them starts another user's run: already sorted
        return None
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return np.lexsort((ts_ms, users))
