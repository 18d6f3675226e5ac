"""Compose the new value of a ring with gaps: its events that the topic no longer has, then those of the topic."""

from collections.abc import Collection
from dataclasses import dataclass

from pipeline.records import EVENT_BYTES
from worker.redis.rings.ring import Ring
from worker.redis.rings.ring_check import FACTS_BYTES, RingCheck


@dataclass(slots=True)
class RingRewrite:
    """One ring while its user's events are read. The ring in Redis stays as it is until all of them are known."""

    stored: Ring  # without events: the offsets that the ring claims
    check: RingCheck | None  # None: the ring has none of the events
    topic: Ring  # the topic's events

    @classmethod
    def start(cls, ring: Ring, sources: Collection[bytes], cap: int) -> "RingRewrite":
        """sources: of the topic's partitions; cap: of the new ring"""
        stored = Ring(ring.cap, 0, ring.source, ring.last_offset, ring.other_source, ring.other_last_offset)
        topic = Ring(
            cap,
            source=ring.source,
            last_offset=-1 if ring.source in sources else ring.last_offset,
            other_source=ring.other_source,
            other_last_offset=-1 if ring.other_source in sources else ring.other_last_offset,
        )
        return cls(stored, RingCheck.start(ring, sources, cap), topic)

    def add(self, ring: Ring, source: bytes, offset: int, event: bytes, is_committed: bool) -> None:
        """Add an event of the topic, unless the workers will. ring: as it is now"""
        if self.check is not None and self.check.claims_event(source, offset):
            self.check.compare(ring, source, event)
        if is_committed or offset <= self.stored.get_last_offset(source):
            self.topic.push(source, offset, event, self.topic.cap)

    def compose(self, ring: Ring) -> Ring:
        """Return the new ring. ring: as it is now; no offset of it is set back"""
        older = self.check.unmatched_events(ring) if self.check is not None else b""
        newer = self.check.events_since_start(ring) if self.check is not None else ring.events
        topic = self.topic
        return Ring(
            topic.cap,
            topic.count + (len(older) + len(newer)) // EVENT_BYTES,
            topic.source,
            max(topic.last_offset, ring.get_last_offset(topic.source)),
            topic.other_source,
            max(topic.other_last_offset, ring.get_last_offset(topic.other_source)),
            (older + topic.events + newer)[-topic.cap * EVENT_BYTES :],
        )


def count_new_events(ring: Ring, new: Ring) -> int:
    """Return how many events of the new ring the old one lacks, by item and time."""
    return len(_facts(new) - _facts(ring))


def _facts(ring: Ring) -> set[bytes]:
    return {ring.events[at : at + FACTS_BYTES] for at in range(0, len(ring.events), EVENT_BYTES)}
