"""Compare a ring in Redis with its user's events in the topic: is it whole, stale, or does it have a gap?

A stale ring ends early, as after a failover to a replica that lagged behind: the events that it lacks are appended. A
ring has a gap when events are missing before others that it holds: it was lost or went stale, and then received newer
events. Pushing cannot fill a gap, because the ring's last offsets say that those events have been appended.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from pipeline.records import EVENT_BYTES
from worker.redis.rings.ring import Ring

EVERY_OFFSET = (1 << 63) - 1
FACTS_BYTES = 14  # item hash and time: the bytes of an event that do not depend on the configuration


@dataclass(slots=True)
class RingCheck:
    """One ring while its user's events are read, in the order of each partition.

    Events of a ring are numbered as they were appended, so that a number stays valid when the oldest are dropped.
    """

    claims: dict[bytes, int]  # by source, the last offset that the ring says it has appended
    begin: int  # the number of the oldest event
    end: int  # the number after the last event
    is_full: bool
    is_outdated: bool  # it has another capacity: it is rewritten in any case
    matched: int = 0  # a bit per event of the ring that was found, from `begin` on
    topic_count: int = 0  # events of the topic, whether the ring should have them or not
    missing: int = 0  # before the first match of their partition: dropped by a full ring, or lost
    has_gap: bool = False
    after_match: dict[bytes, int] = field(default_factory=dict)  # by source, the number after its latest match

    @classmethod
    def start(cls, ring: Ring, sources: Collection[bytes], cap: int) -> "RingCheck | None":
        """Return a check of the ring, or None when the ring does not claim to have any event of these sources."""
        stored = {ring.source: ring.last_offset, ring.other_source: ring.other_last_offset}
        claims = {source: offset for source, offset in stored.items() if source in sources}
        is_outdated = ring.count > 0 and ring.cap != cap
        if is_outdated:
            claims = dict.fromkeys(sources, EVERY_OFFSET)
        elif len(claims) == 2:  # a third source may have been forgotten
            claims = dict.fromkeys(sources, EVERY_OFFSET) | claims
        if max(claims.values(), default=-1) < 0:
            return None
        return cls(claims, _first_number(ring), ring.count, ring.count >= ring.cap, is_outdated)

    def claims_event(self, source: bytes, offset: int) -> bool:
        """Whether pushing the event would be skipped, because the ring should have it."""
        return offset <= self.claims.get(source, -1)

    def compare(self, ring: Ring, source: bytes, event: bytes) -> None:
        """Look for an event that the ring should have. ring: as it is now"""
        first = _first_number(ring)
        index = _find(ring.events, event, max(0, self.after_match.get(source, self.begin) - first))
        if index is None and source in self.after_match:
            self.has_gap = True
        elif index is None:
            self.missing += 1
        else:
            number = first + index
            self.matched |= 1 << (number - self.begin)
            self.after_match[source] = number + 1

    @property
    def must_rewrite(self) -> bool:
        """Whether the ring has a gap: events are missing that are not simply the oldest ones of a full ring."""
        has_older = self.end - self.begin > self.matched.bit_count()  # events that the topic no longer has
        return self.has_gap or self.is_outdated or (self.missing > 0 and (has_older or not self.is_full))

    def unmatched_events(self, ring: Ring) -> bytes:
        """Return the events that were not found and are still in the ring, without those appended since the start."""
        first = _first_number(ring)
        numbers = range(max(first, self.begin), min(self.end, ring.count))
        return b"".join(_event(ring, each - first) for each in numbers if not self.matched >> (each - self.begin) & 1)

    def events_since_start(self, ring: Ring) -> bytes:
        """Return the events that were appended after the check started."""
        return ring.events[max(0, self.end - _first_number(ring)) * EVENT_BYTES :]


def _event(ring: Ring, index: int) -> bytes:
    return ring.events[index * EVENT_BYTES : (index + 1) * EVENT_BYTES]


def _first_number(ring: Ring) -> int:
    return ring.count - len(ring.events) // EVENT_BYTES


def _find(events: bytes, event: bytes, start: int) -> int | None:
    """Return the index of the first event with the same facts, from `start` on."""
    facts = event[:FACTS_BYTES]
    position = events.find(facts, start * EVENT_BYTES)
    while position % EVENT_BYTES and position > 0:
        position = events.find(facts, position + 1)
    return None if position < 0 else position // EVENT_BYTES
