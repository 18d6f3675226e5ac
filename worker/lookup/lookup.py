"""Look up a user's slate, for product backends.

example:
  async with Lookup(config) as lookup:
      slate = await lookup.slate("u1")
"""

import asyncio

import msgspec

from pipeline.slates import Slate
from worker.config import Config
from worker.errors import StoreUnavailable, UnknownUser
from worker.redis.client import RedisClient
from worker.redis.read_batcher import ReadBatcher
from worker.redis.slates import decode_slate


class Lookup:
    """Reads slates from Redis: one GET for a user with a slate, two for one without. Connects at the first read.

    Any number of lookups may run at a time: they share one connection per node (`ReadBatcher`). Each takes at most
    `redis.timeout_s`.
    """

    def __init__(self, config: Config) -> None:
        """Read the slates of the deployment that this configuration describes: Redis, and the prefix of its keys."""
        self._timeout_s = config.redis.timeout_s
        self._client = RedisClient(config.redis, config.key_prefix)
        self._reads = ReadBatcher(self._client)

    async def __aenter__(self) -> "Lookup":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def slate(self, user_id: str) -> Slate:
        """Return the user's last slate, else the popular one (strategy `popular`, why `default`).

        Raises UnknownUser when there is neither, StoreUnavailable when Redis is unreachable, StoreError.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._slate(user_id)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"Redis at {self._client.address} did not answer a lookup within {self._timeout_s:g} s"
            ) from error

    async def check(self) -> None:
        """Return when Redis answers. Raises StoreUnavailable, StoreError."""
        await self._reads.get(self._client.keys.popular)

    async def aclose(self) -> None:
        await self._reads.aclose()
        await self._client.aclose()

    async def _slate(self, user_id: str) -> Slate:
        slate = await self._read(self._client.keys.slate(user_id))
        if slate is not None:
            return slate
        popular = await self._read(self._client.keys.popular)
        if popular is None:
            raise UnknownUser(
                f"no slate for user {user_id[:256]!r} in Redis at {self._client.address}, and no popular one yet: "
                f"a worker (`millrace run`) writes the first with its first events"
            )
        return msgspec.structs.replace(popular, user_id=user_id)

    async def _read(self, key: str) -> Slate | None:
        value = await self._reads.get(key)
        return None if value is None else decode_slate(key, value)
