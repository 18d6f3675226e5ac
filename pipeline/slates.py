"""A slate, the answer to a user's events: ranked items, the events that it covers, and why it was ranked so.

The garbage collector does not track these structs: they hold no cycles, and millions of them pass every hour.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

# Why a strategy ranked a slate:
#   best       nothing was requested, and it is the first strategy of the fallback order in this process
#   requested  a header or `pipeline.strategy` named it
#   missing    the requested strategy is not in this process; this is the next one that is
#   failed     an earlier strategy raised an error on this batch
#   cooling    an earlier strategy is skipped for a while, because it failed on an older batch
#   default    the popular slate, which stands for users without a slate of their own
Why = Literal["best", "requested", "missing", "failed", "cooling", "default"]


class SlateItem(msgspec.Struct, frozen=True, gc=False):
    """One ranked item. The three head outputs are probabilities, or None when the strategy has no model."""

    item_id: str
    score: float
    engagement: float | None
    retention: float | None
    monetization: float | None
    source: str


class Covers(msgspec.Struct, frozen=True, gc=False):
    """Offsets of one partition: the slate answers all of the user's events in [first_offset, last_offset]."""

    topic: str
    partition: int
    first_offset: int
    last_offset: int
    count: int
    oldest_ts_ms: int


class Latency(msgspec.Struct, frozen=True, gc=False):
    """Milliseconds per stage; `total` runs from the poll of the oldest covered event to the slate's creation."""

    queue: float = 0.0
    features: float = 0.0
    cache: float = 0.0
    encode: float = 0.0
    generate: float = 0.0
    rank: float = 0.0
    total: float = 0.0


class Slate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The ranked answer to a user's events (topic `recommendations`, key = user id, and Redis `rec:{u:<user>}`).

    backend: the runtime that `strategy` ranked with; why: a value of `Why`. Both are plain text with a default, so that
    slates which a worker of another version stored can be read
    """

    user_id: str
    items: list[SlateItem]
    strategy: str
    backend: str = "unknown"
    why: str = "unknown"
    model_version: str
    covers: Covers
    created_ms: int
    latency_ms: Latency


_encoder = msgspec.json.Encoder()


def encode_slates(slates: Iterable[Slate]) -> list[bytes]:
    """Return the JSON of each slate, as its topic and Redis hold it."""
    buffer = bytearray()  # of one length for all: a third faster than one that grows for each
    values: list[bytes] = []
    for slate in slates:
        _encoder.encode_into(slate, buffer)
        values.append(bytes(buffer))
    return values
