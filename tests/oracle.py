"""The oracle: a pure-Python model of the stream, written from the docs and sharing no line with the worker.

It reads what went into the events topic, works out every user's ring byte for byte and every event that needs an
answer, and compares them with what Redis and the output topic hold.
"""

import json
import math
import struct
from collections import defaultdict
from hashlib import blake2b

ACTIONS = ("view", "click", "like", "cart", "purchase", "rate", "share", "skip")
DEVICES = ("mobile", "desktop", "tablet", "tv")


def hash64(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def pack(event: dict) -> bytes:
    """24 bytes: item hash u64, ts u48, action, device u8, dwell, value u16, position, flags u8, context u16."""
    value, dwell, position = event.get("value"), event.get("dwell_ms"), event.get("position")
    device = event.get("device")
    out = hash64(event["item_id"]) + event["ts_ms"].to_bytes(6, "little")
    out += bytes([ACTIONS.index(event["action"]) + 1, DEVICES.index(device) + 1 if device in DEVICES else 0])
    out += struct.pack("<H", 0 if dwell is None else 1 + min(65534, dwell // 100))
    out += struct.pack("<H", 0 if value is None else 1 + min(65534, round(math.log1p(value) * 3000)))
    out += bytes([0 if position is None else 1 + min(254, position), 0])
    pairs = json.dumps(sorted((event.get("context") or {}).items()), separators=(",", ":"), ensure_ascii=False)
    context = 1 + int.from_bytes(hash64(pairs), "little") % 65535 if event.get("context") else 0
    return out + struct.pack("<H", context)


class Oracle:
    """Feed it the events topic's valid records in offset order; each user's on one partition, as their key demands."""

    def __init__(self, topic: str, cap: int, epoch: str = "1", triggers: tuple[str, ...] = ACTIONS) -> None:
        self.topic, self.cap, self.epoch, self.triggers = topic, cap, epoch, triggers
        self.events: dict[str, list[bytes]] = defaultdict(list)
        self.last: dict[str, tuple[int, int]] = {}
        self.unanswered: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def feed(self, partition: int, offset: int, event: dict) -> None:
        user = event["user_id"]
        self.events[user].append(pack(event))
        self.last[user] = partition, offset
        if event["action"] in self.triggers:
            self.unanswered[user].add((partition, offset))

    def ring(self, user: str) -> bytes:
        events, (partition, offset) = self.events[user], self.last[user]
        slots = [b""] * min(len(events), self.cap)
        for number, event in enumerate(events):
            slots[number % self.cap] = event
        source = hash64(f"{self.epoch}\0{self.topic}\0{partition}") + struct.pack("<q", offset)
        return struct.pack("<BBHI", 1, 24, self.cap, len(events)) + source + bytes(16) + b"".join(slots)

    def rings(self) -> dict[str, bytes]:
        return {f"seq:{{u:{user}}}": self.ring(user) for user in self.events}

    def check_slates(self, slates: list[dict]) -> None:
        """`slates` of each user in topic order: every triggering event covered, first answers in the events' order."""
        covered: dict[str, int] = defaultdict(lambda: -1)
        for slate in slates:
            user, covers = slate["user_id"], slate["covers"]
            offsets = {o for p, o in self.unanswered[user] if p == covers["partition"]}
            span = {o for o in offsets if covers["first_offset"] <= o <= covers["last_offset"]}
            skipped = {o for o in offsets if covered[user] < o < covers["first_offset"]}
            assert len(span) == covers["count"], f"{user}: covers {covers}, the topic has {sorted(span)}"
            assert not skipped, f"{user}: answered {covers} before {sorted(skipped)}"
            covered[user] = max(covered[user], covers["last_offset"])
        lost = self.lost(slates)
        assert not lost, f"events without a slate: {lost}"

    def lost(self, slates: list[dict]) -> list[tuple[str, int, int]]:
        """(user, partition, offset) of every triggering event that no slate covers."""
        covered = {
            (slate["user_id"], covers["partition"], offset)
            for slate in slates
            for covers in [slate["covers"]]
            for offset in range(covers["first_offset"], covers["last_offset"] + 1)
        }
        return sorted({(user, *at) for user, wanted in self.unanswered.items() for at in wanted} - covered)
