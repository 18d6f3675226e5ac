"""The oracle: a pure-Python model of the stream, written from the docs, which shares no code with the worker.

It reads the events topic, computes every user's ring byte for byte and every event that needs a slate, and compares
them with Redis and the recommendations topic.
"""

import json
import math
import struct
from collections import defaultdict
from hashlib import blake2b

ACTIONS = ("view", "click", "like", "cart", "purchase", "rate", "share", "skip")
DEVICES = ("mobile", "desktop", "tablet", "tv")
BACKENDS = {"hstu": {"torch", "kernels"}, "simple": {"numpy"}}
REASONS = {"best", "requested", "missing", "failed", "cooling"}


def hash64(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def pack(event: dict) -> bytes:
    """Return 24 bytes: item hash u64, ts u48, action, device u8, dwell, value u16, position, flags u8, context u16."""
    value = event.get("value")
    dwell_ms = event.get("dwell_ms")
    position = event.get("position")
    device = event.get("device")
    packed = hash64(event["item_id"]) + event["ts_ms"].to_bytes(6, "little")
    packed += bytes([ACTIONS.index(event["action"]) + 1, DEVICES.index(device) + 1 if device in DEVICES else 0])
    packed += struct.pack("<H", 0 if dwell_ms is None else 1 + min(65534, dwell_ms // 100))
    packed += struct.pack("<H", 0 if value is None else 1 + min(65534, round(math.log1p(value) * 3000)))
    packed += bytes([0 if position is None else 1 + min(254, position), 0])
    pairs = json.dumps(sorted((event.get("context") or {}).items()), separators=(",", ":"), ensure_ascii=False)
    context = 1 + int.from_bytes(hash64(pairs), "little") % 65535 if event.get("context") else 0
    return packed + struct.pack("<H", context)


class Oracle:
    """Feed it the events topic's valid records as they were appended: in offset order, a user's from two partitions.

    cap: events per ring; triggers: actions that need a slate
    """

    def __init__(self, topic: str, cap: int, topic_generation: str = "1", triggers: tuple[str, ...] = ACTIONS) -> None:
        self.topic = topic
        self.cap = cap
        self.topic_generation = topic_generation
        self.triggers = triggers
        self.events: dict[str, list[bytes]] = defaultdict(list)
        self.last: dict[str, dict[int, int]] = defaultdict(dict)  # partition: offset, the latest partition at the end
        self.to_answer: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def feed(self, partition: int, offset: int, event: dict) -> None:
        user = event["user_id"]
        self.events[user].append(pack(event))
        self.last[user].pop(partition, None)
        self.last[user][partition] = offset
        if event["action"] in self.triggers:
            self.to_answer[user].add((partition, offset))

    def ring(self, user: str) -> bytes:
        events = self.events[user]
        assert len(self.last[user]) <= 2, f"{user}: events in partitions {sorted(self.last[user])}"
        slots = [b""] * min(len(events), self.cap)
        for number, event in enumerate(events):
            slots[number % self.cap] = event
        sources = b"".join(self.source(*each) for each in reversed(self.last[user].items())).ljust(32, b"\0")
        return struct.pack("<BBHI", 1, 24, self.cap, len(events)) + sources + b"".join(slots)

    def source(self, partition: int, offset: int) -> bytes:
        return hash64(f"{self.topic_generation}\0{self.topic}\0{partition}") + struct.pack("<q", offset)

    def rings(self, prefix: str = "") -> dict[str, bytes]:
        """Return the rings by key. prefix: of the keys"""
        return {f"{prefix}seq:{{u:{user}}}": self.ring(user) for user in self.events}

    def check_slates(self, slates: list[dict]) -> None:
        """Check that slates cover every triggering event, and no event before an earlier one of its user.

        Each names a backend of its strategy and a reason. slates: those of each user in topic order
        """
        for slate in slates:
            user = slate["user_id"]
            covers = slate["covers"]
            assert slate["backend"] in BACKENDS[slate["strategy"]], f"{user}: {slate}"
            assert slate["why"] in REASONS, f"{user}: {slate}"
            offsets = {offset for partition, offset in self.to_answer[user] if partition == covers["partition"]}
            covered = {offset for offset in offsets if covers["first_offset"] <= offset <= covers["last_offset"]}
            assert len(covered) == covers["count"], f"{user}: covers {covers}, the topic has {sorted(covered)}"
        out_of_order = self.out_of_order(slates)
        assert not out_of_order, f"answered before earlier events of the user: {out_of_order}"
        lost = self.lost(slates)
        assert not lost, f"events without a slate: {lost}"

    def out_of_order(self, slates: list[dict]) -> list[dict]:
        """Return the slates that cover an event before an earlier one of its user is covered."""
        last_covered: dict[tuple[str, int], int] = defaultdict(lambda: -1)  # by user and partition
        early = []
        for slate in slates:
            covers = slate["covers"]
            key = slate["user_id"], covers["partition"]
            offsets = {offset for partition, offset in self.to_answer[key[0]] if partition == key[1]}
            if any(last_covered[key] < offset < covers["first_offset"] for offset in offsets):
                early.append(slate)
            last_covered[key] = max(last_covered[key], covers["last_offset"])
        return early

    def lost(self, slates: list[dict]) -> list[tuple[str, int, int]]:
        """Return (user, partition, offset) of every triggering event that no slate covers."""
        covered = {
            (slate["user_id"], covers["partition"], offset)
            for slate in slates
            for covers in [slate["covers"]]
            for offset in range(covers["first_offset"], covers["last_offset"] + 1)
        }
        to_answer = {(user, *record) for user, records in self.to_answer.items() for record in records}
        return sorted(to_answer - covered)
