"""Users' last slates in Redis: `rec:{u:<user>}` per user, `rec:popular` for users without one.

The value is 16 bytes (source and last offset, which the function compares) followed by the slate as JSON, so that a
reader needs one GET and no function.
"""

from collections.abc import Sequence

import msgspec

from pipeline.records import DAY_S
from pipeline.slates import Slate, encode_slates
from worker.config import SlatesConfig
from worker.errors import StoreError
from worker.interfaces import Partition
from worker.redis.client import Command, RedisClient
from worker.redis.functions import PUT_SLATE
from worker.redis.rings.ring import source_id

STAMP_BYTES = 16
NO_SOURCE = bytes(8)  # the popular slate's: it covers no partition, its offset is the newest counted event time
_decoder = msgspec.json.Decoder(Slate)


class SlateStore:
    """Implements SlateWriter. `topic_generation` is that of the rings: a re-created topic's offsets restart from 0."""

    def __init__(self, client: RedisClient, config: SlatesConfig, topic_generation: str = "1") -> None:
        self._client = client
        self._topic_generation = topic_generation
        self._ttl_s = str(int(config.ttl_days * DAY_S)).encode()

    async def put(self, slates: Sequence[Slate], values: Sequence[bytes] | None = None) -> None:
        """Write the slates in one round trip, except where a slate of the same partition covers later offsets.

        Idempotent. Raises StoreUnavailable (put all again), StoreError. values: the slates' JSON; None: made here
        """
        values = values or encode_slates(slates)
        await self._client.pipeline([self._command(*each) for each in zip(slates, values, strict=True)])

    async def put_popular(self, slate: Slate, as_of_ms: int) -> None:
        """Write the slate of users without one, unless the stored one has counts of a later time. Same errors."""
        await self._client.call(
            "FCALL",
            PUT_SLATE.function,
            1,
            self._client.keys.popular,
            NO_SOURCE,
            as_of_ms,
            *encode_slates([slate]),
            self._ttl_s,
        )

    def _command(self, slate: Slate, value: bytes) -> Command:
        covers = slate.covers
        source = source_id(self._topic_generation, Partition(covers.topic, covers.partition))
        key = self._client.keys.slate(slate.user_id)
        return "FCALL", PUT_SLATE.function, 1, key, source, covers.last_offset, value, self._ttl_s


def decode_slate(key: str, value: bytes) -> Slate:
    """Return the slate that is stored under the key. Raises StoreError when the value is not a slate."""
    try:
        return _decoder.decode(value[STAMP_BYTES:])
    except msgspec.MsgspecError as error:
        raise StoreError(f"{key} in Redis is not a slate: {error}") from error
