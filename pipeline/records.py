"""The data that crosses every room: events, items, slates, and the packed form of a user's sequence.

An event lives in two forms. On the wire it is an `Event` (JSON or MessagePack). In a user's ring it is 24 bytes of raw
facts (`EVENT_DTYPE`), which the model reads as numpy columns without touching a Python object per event.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.jagged import ranges

Id = Annotated[str, Meta(min_length=1, max_length=256)]
MAX_TS_MS = (1 << 48) - 1  # the ring keeps 48 bits: the year 10889
DAY_MS = 86_400_000
DAY_S = 86_400

EVENT_BYTES = 24
# `ts_action_device` holds ts_ms in its low 48 bits, then the action's and the device's byte.
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
CHUNK_EVENTS = 1 << 18  # columns made from so many events at a time are some 50 MiB, and no slower than at once
VALUE_STEPS = 3000.0  # log1p(value) in steps of 1/3000: 0.03 % apart, up to 3.0e9


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One behaviour of one user. Units: `ts_ms`, `dwell_ms` milliseconds; `value` in the shop's currency or stars."""

    user_id: Id
    item_id: Id
    action: Annotated[str, Meta(min_length=1, max_length=64)]
    ts_ms: Annotated[int, Meta(ge=0, le=MAX_TS_MS)]
    value: Annotated[float, Meta(ge=0)] | None = None
    dwell_ms: Annotated[int, Meta(ge=0)] | None = None
    session_id: str | None = None
    device: str | None = None
    position: Annotated[int, Meta(ge=0)] | None = None
    context: dict[str, str | int | float | bool | None] | None = None


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of an item (topic `items`, compacted, key = item id)."""

    item_id: Id
    title: str | None = None
    text: str | None = None
    category: list[str] = []
    brand: str | None = None
    price: Annotated[float, Meta(ge=0)] | None = None
    created_ms: Annotated[int, Meta(ge=0, le=MAX_TS_MS)] | None = None
    tags: list[str] = []


class SlateItem(msgspec.Struct, frozen=True):
    """One ranked item. The three head outputs are probabilities, or None where the rung has no model."""

    item_id: str
    score: float
    engagement: float | None
    retention: float | None
    monetization: float | None
    source: str


class Covers(msgspec.Struct, frozen=True):
    """All of the user's events of this partition in [first_offset, last_offset] are answered by the slate."""

    topic: str
    partition: int
    first_offset: int
    last_offset: int
    count: int
    oldest_ts_ms: int


class Latency(msgspec.Struct, frozen=True):
    """Milliseconds by stage; `total` runs from the poll of the oldest covered event to the slate's creation."""

    queue: float = 0.0
    features: float = 0.0
    cache: float = 0.0
    encode: float = 0.0
    generate: float = 0.0
    rank: float = 0.0
    total: float = 0.0


class Slate(msgspec.Struct, frozen=True):
    """The ranked answer to a user's events (topic `recommendations`, key = user id, and Redis `rec:{u:<user>}`)."""

    user_id: str
    items: list[SlateItem]
    strategy: str
    model_version: str
    covers: Covers
    created_ms: int
    latency_ms: Latency


class EventSchema(msgspec.Struct, frozen=True):
    """The names behind the ring's one-byte codes; code 0 is 'unknown', name i has code i + 1.

    The lists may only grow at their end, or rings in Redis would change their meaning.
    """

    actions: tuple[str, ...] = ("view", "click", "like", "cart", "purchase", "rate", "share", "skip")
    devices: tuple[str, ...] = ("mobile", "desktop", "tablet", "tv")

    def action_codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.actions, 1)}

    def device_codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.devices, 1)}


@lru_cache(maxsize=1 << 20)
def item_hash(item_id: str) -> int:
    """The item's 64-bit name in rings: BLAKE2b of its UTF-8 id, little endian; 0 is kept for padding."""
    return int.from_bytes(blake2b(item_id.encode(), digest_size=8).digest(), "little") or 1


def encode_value(value: float | None) -> int:
    """Log code of a non-negative value in 16 bits; 0 = missing."""
    return 0 if value is None else 1 + min(65534, round(math.log1p(value) * VALUE_STEPS))


def decode_values(codes: np.ndarray) -> np.ndarray:
    """float64: the values of encode_value's codes, uint16; 0 where one is missing."""
    return np.where(codes > 0, np.expm1((codes.astype(np.float64) - 1) / VALUE_STEPS), 0.0)


class EventPacker:
    """Packs events into their 24 ring bytes. An action outside the schema is a KeyError: check it before."""

    def __init__(self, schema: EventSchema) -> None:
        self._actions = schema.action_codes()
        self._devices = schema.device_codes()

    def pack(self, event: Event) -> bytes:
        action, device = self._actions[event.action], self._devices.get(event.device or "", 0)
        dwell = 0 if event.dwell_ms is None else 1 + min(65534, event.dwell_ms // 100)  # steps of 100 ms, up to 1.8 h
        position = 0 if event.position is None else 1 + min(254, event.position)
        return _PACK.pack(
            item_hash(event.item_id),
            event.ts_ms | action << 48 | device << 56,
            dwell,
            encode_value(event.value),
            position,
            0,
            context_code(event.context),
        )


def context_code(context: dict | None) -> int:
    """A 16-bit name of the context's pairs, independent of their order; 0 = none."""
    if not context:
        return 0
    pairs = msgspec.json.encode(sorted(context.items()))
    return 1 + int.from_bytes(blake2b(pairs, digest_size=8).digest(), "little") % 65535


class Histories:
    """Packed (jagged) histories of n users: columns over all events, `offsets` marks each user's run.

    events:  structured array EVENT_DTYPE, [total], each user's run sorted stably by (ts, arrival)
    offsets: int64 [n + 1], events of user i are events[offsets[i]:offsets[i + 1]]
    """

    __slots__ = ("events", "offsets")

    def __init__(self, events: np.ndarray, offsets: np.ndarray) -> None:
        self.events, self.offsets = events, offsets

    @classmethod
    def from_rings(cls, rings: Sequence[bytes]) -> "Histories":
        """From ring bytes in arrival order, one string of n * 24 bytes a user; no per-event Python."""
        offsets = np.zeros(len(rings) + 1, np.int64)
        np.cumsum([len(ring) // EVENT_BYTES for ring in rings], out=offsets[1:])
        events = np.frombuffer(b"".join(rings), EVENT_DTYPE)
        return cls(_sorted_by_time(events, offsets), offsets)

    @classmethod
    def from_events(cls, histories: Iterable[Iterable[Event]], schema: EventSchema) -> "Histories":
        """From decoded events, one iterable a user (the library's way in)."""
        packer = EventPacker(schema)
        return cls.from_rings([b"".join(map(packer.pack, history)) for history in histories])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:  # int64 [n]
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """int64 [total]: the row of each event's user."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def items(self) -> np.ndarray:  # uint64 [total] item hashes
        return self.events["item"]

    @property
    def ts_ms(self) -> np.ndarray:  # int64 [total]
        return (self.events["ts_action_device"] & np.uint64(MAX_TS_MS)).astype(np.int64)

    @property
    def actions(self) -> np.ndarray:  # uint8 [total], 0 = unknown
        return (self.events["ts_action_device"] >> np.uint64(48)).astype(np.uint8)

    @property
    def devices(self) -> np.ndarray:  # uint8 [total], 0 = unknown
        return (self.events["ts_action_device"] >> np.uint64(56)).astype(np.uint8)

    def tail(self, cap: int) -> "Histories":
        """Each user's last `cap` events."""
        if len(self) == 0 or int(self.lengths.max()) <= cap:
            return self
        kept = np.minimum(self.lengths, cap)
        index, offsets = ranges(self.offsets[1:] - kept, kept)
        return Histories(self.events[index], offsets)

    def chunks(self, events: int = CHUNK_EVENTS) -> "Iterator[tuple[slice, Histories]]":
        """Whole users, one after the other, at most so many events at a time if no single user has more: where they
        lie in this one's columns, and a view of them."""
        first = 0
        while first < len(self):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + events, "right")) - 1
            offsets = self.offsets[first : max(first + 1, last) + 1]
            place = slice(int(offsets[0]), int(offsets[-1]))
            yield place, Histories(self.events[place], offsets - offsets[0])
            first += len(offsets) - 1

    def select(self, rows: np.ndarray) -> "Histories":
        """The histories of these user rows, in this order."""
        index, offsets = ranges(self.offsets[rows], self.lengths[rows])
        return Histories(self.events[index], offsets)


def _sorted_by_time(events: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    ts = events["ts_action_device"] & np.uint64(MAX_TS_MS)
    backwards = np.flatnonzero(ts[1:] < ts[:-1]) + 1
    if np.isin(backwards, offsets).all():  # every step back in time starts another user's run: sorted already
        return events
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return events[np.lexsort((ts, users))]
