"""A user's ring in this process: the same bytes as in Redis, and the same append (sequences.lua is its twin)."""

import struct
from dataclasses import dataclass

from pipeline.records import EVENT_BYTES

FORMAT = 1
HEADER = struct.Struct("<BBHI8sq8sq")
NO_SOURCE = bytes(8)
PREFIX = bytes([FORMAT, EVENT_BYTES])
MAX_COUNT = 1 << 31  # the count is taken back by whole rings before it outgrows its 32 bits


@dataclass(slots=True)
class Ring:
    """`events` are oldest first. `source` is the one pushed last, with its last offset."""

    cap: int
    count: int = 0  # ever appended
    source: bytes = NO_SOURCE
    last: int = 0
    other: bytes = NO_SOURCE
    other_last: int = 0
    events: bytes = b""

    @classmethod
    def from_value(cls, value: bytes, cap: int) -> "Ring":
        """From the value in Redis, or empty bytes where there is none. ValueError: not this format."""
        if not value:
            return cls(cap)
        if len(value) < HEADER.size or value[:2] != PREFIX:
            raise ValueError(
                f"not a ring of format {FORMAT}, {EVENT_BYTES} bytes an event: it begins with {value[:8]!r}"
            )
        _, _, cap, count, source, last, other, other_last = HEADER.unpack_from(value)
        start = HEADER.size + count % cap * EVENT_BYTES if count > cap else HEADER.size
        events = value[start:] + value[HEADER.size : start]
        return cls(cap, count, source, last, other, other_last, events)

    def header(self) -> bytes:
        """The 40 bytes that name this version of the ring; empty while nothing was ever pushed."""
        if self.source == NO_SOURCE:
            return b""
        return HEADER.pack(
            FORMAT, EVENT_BYTES, self.cap, self.count, self.source, self.last, self.other, self.other_last
        )

    def value(self) -> bytes:
        """As Redis stores it."""
        if self.count < self.cap:
            return self.header() + self.events
        oldest = (
            self.cap - self.count % self.cap
        ) * EVENT_BYTES  # bytes from the oldest event's slot to the ring's end
        return self.header() + self.events[oldest:] + self.events[:oldest]

    def push(self, source: bytes, offset: int, event: bytes, cap: int) -> bool:
        """Append one event unless its source has been read beyond it. False: it has."""
        if offset <= self.last_offset(source):
            return False
        if source != self.source:  # known or not: the pair used less recently makes room
            self.other, self.other_last, self.source = self.source, self.last, source
        if cap != self.cap:
            self._migrate(cap)
        self.last = offset
        self.count += 1
        if self.count >= MAX_COUNT:
            self.count = cap + MAX_COUNT % cap
        events = self.events + event
        self.events = events if len(events) <= cap * EVENT_BYTES else events[EVENT_BYTES:]
        return True

    def last_offset(self, source: bytes) -> int:
        """-1 when the source is new."""
        if source == self.source:
            return self.last
        return self.other_last if source == self.other else -1

    def _migrate(self, cap: int) -> None:
        length = len(self.events) // EVENT_BYTES
        if length > cap:
            self.events = self.events[-cap * EVENT_BYTES :]
        elif length < cap:
            self.count = length  # what a smaller ring had dropped stays lost
        self.cap = cap
