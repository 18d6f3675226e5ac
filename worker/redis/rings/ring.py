"""A user's ring in this process: the same bytes as in Redis, and the same append as in sequences.lua."""

import struct
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from pipeline.records import EVENT_BYTES
from worker.interfaces import Partition

FORMAT = 1
HEADER = struct.Struct("<BBHI8sq8sq")
NO_SOURCE = bytes(8)
PREFIX = bytes([FORMAT, EVENT_BYTES])
MAX_COUNT = 1 << 31  # the count is reduced by whole rings before it outgrows its 32 bits


@cache
def source_id(topic_generation: str, partition: Partition) -> bytes:
    """Return the 8 bytes that name a partition of this topic generation in rings and slates."""
    return blake2b(f"{topic_generation}\0{partition.topic}\0{partition.partition}".encode(), digest_size=8).digest()


@dataclass(slots=True)
class Ring:
    """`events` are oldest first. `source` is the one pushed most recently, with its last offset."""

    cap: int
    count: int = 0  # ever appended
    source: bytes = NO_SOURCE
    last_offset: int = 0
    other_source: bytes = NO_SOURCE
    other_last_offset: int = 0
    events: bytes = b""

    @classmethod
    def from_value(cls, value: bytes, cap: int) -> "Ring":
        """Parse the value in Redis, empty bytes where there is none. Raises ValueError for another format."""
        if not value:
            return cls(cap)
        ring = cls.from_header(value[: HEADER.size])
        cap = ring.cap
        count = ring.count
        length = HEADER.size + min(count, cap) * EVENT_BYTES
        if len(value) != length:
            raise ValueError(f"not a ring: {len(value)} bytes, where its header wants {length}")
        oldest = HEADER.size + count % cap * EVENT_BYTES if count > cap else HEADER.size
        ring.events = value[oldest:] + value[HEADER.size : oldest]
        return ring

    @classmethod
    def from_header(cls, header: bytes) -> "Ring":
        """Parse the 40 bytes alone: a ring without its events. ValueError as in `from_value`."""
        if len(header) < HEADER.size or header[:2] != PREFIX:
            raise ValueError(
                f"not a ring of format {FORMAT}, {EVENT_BYTES} bytes per event: it begins with {header[:8]!r}"
            )
        _, _, cap, count, *sources = HEADER.unpack(header)
        if cap == 0:
            raise ValueError("not a ring: it has room for no event")
        return cls(cap, count, *sources)

    def header(self) -> bytes:
        """Return the 40 bytes that name this version of the ring; empty before the first push."""
        if self.source == NO_SOURCE:
            return b""
        return HEADER.pack(
            FORMAT,
            EVENT_BYTES,
            self.cap,
            self.count,
            self.source,
            self.last_offset,
            self.other_source,
            self.other_last_offset,
        )

    def value(self) -> bytes:
        """Return the ring as Redis stores it."""
        if self.count < self.cap:
            return self.header() + self.events
        to_end = (self.cap - self.count % self.cap) * EVENT_BYTES  # from the oldest event's slot to the ring's end
        return self.header() + self.events[to_end:] + self.events[:to_end]

    def push(self, source: bytes, offset: int, event: bytes, cap: int) -> bool:
        """Append one event. Return False when its source has been read up to it or beyond."""
        if offset <= self.get_last_offset(source):
            return False
        if source != self.source:  # whether new or the other one: the pair used less recently is replaced
            self.other_source = self.source
            self.other_last_offset = self.last_offset
            self.source = source
        if cap != self.cap:
            self._migrate(cap)
        self.last_offset = offset
        self.count += 1
        if self.count >= MAX_COUNT:
            self.count = cap + MAX_COUNT % cap
        events = self.events + event
        self.events = events if len(events) <= cap * EVENT_BYTES else events[EVENT_BYTES:]
        return True

    def get_last_offset(self, source: bytes) -> int:
        """Return the last offset of a source, -1 for a new one."""
        if source == self.source:
            return self.last_offset
        return self.other_last_offset if source == self.other_source else -1

    def _migrate(self, cap: int) -> None:
        length = len(self.events) // EVENT_BYTES
        if length > cap:
            self.events = self.events[-cap * EVENT_BYTES :]
        elif length < cap:
            self.count = length  # events that a smaller ring has dropped stay lost
        self.cap = cap
