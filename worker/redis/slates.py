"""Users' last slates in Redis: `rec:{u:<user>}` for each, `rec:popular` for those who have none.

The value is 16 bytes (source, last offset: what the function compares) and then the slate as JSON, so that a reader
needs one GET and no function.
"""

from collections.abc import Sequence

import msgspec

from pipeline.records import DAY_S, Slate
from worker.config import SlatesConfig as Config
from worker.errors import StoreError
from worker.interfaces import Partition
from worker.redis.client import POPULAR_KEY, Command, RedisClient, slate_key
from worker.redis.sequences import source_id

STAMP_BYTES = 16
NO_SOURCE = bytes(8)  # of the popular slate: it covers no partition, its offset is the newest event time counted
_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Slate)


class SlateStore:
    """`epoch` is that of the rings: offsets of a re-created topic begin anew."""

    def __init__(self, client: RedisClient, config: Config, topic_generation: str = "1") -> None:
        self._client, self._topic_generation = client, topic_generation
        self._ttl_s = str(int(config.ttl_days * DAY_S)).encode()
        self._sources: dict[Partition, bytes] = {}

    async def put(self, slates: Sequence[Slate]) -> None:
        """One round trip. A slate is dropped when one of its partition that covers later offsets is there already.

        Idempotent. Raises StoreUnavailable (put all again), StoreError.
        """
        await self._client.pipeline([self._command(slate) for slate in slates])

    async def put_popular(self, slate: Slate, as_of_ms: int) -> None:
        """The answer for users without a slate, unless there is one with counts of a later time. Same errors."""
        await self._client.call(
            "FCALL", "millrace_slate", 1, POPULAR_KEY, NO_SOURCE, as_of_ms, _encode(slate), self._ttl_s
        )

    def _command(self, slate: Slate) -> Command:
        covers = slate.covers
        partition = Partition(covers.topic, covers.partition)
        source = self._sources.get(partition)
        if source is None:
            source = self._sources[partition] = source_id(self._topic_generation, partition)
        key = slate_key(slate.user_id)
        return "FCALL", "millrace_slate", 1, key, source, covers.last_offset, _encode(slate), self._ttl_s


async def read_slate(client: RedisClient, key: str) -> Slate | None:
    """What is stored under a slate's key. StoreError when it is no slate."""
    value = await client.call("GET", key)
    if value is None:
        return None
    try:
        return _decoder.decode(value[STAMP_BYTES:])
    except msgspec.MsgspecError as error:
        raise StoreError(f"{key} in Redis is no slate: {error}") from error
