"""Look up a user's slate, for product backends.

example:
  async with Lookup(config.redis) as lookup:
      slate = await lookup.slate("u1")
"""

import msgspec

from pipeline.slates import Slate
from worker.config import RedisConfig
from worker.errors import UnknownUser
from worker.redis.client import POPULAR_KEY, RedisClient, slate_key
from worker.redis.slates import read_slate


class Lookup:
    """Reads slates from Redis: one GET for a user with a slate, two for one without. Connects at the first read."""

    def __init__(self, config: RedisConfig) -> None:
        self._client = RedisClient(config)

    async def __aenter__(self) -> "Lookup":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def slate(self, user_id: str) -> Slate:
        """Return the user's last slate, else the popular one (strategy `popular`, why `default`).

        Raises UnknownUser when there is neither, StoreUnavailable when Redis is unreachable, StoreError.
        """
        slate = await read_slate(self._client, slate_key(user_id))
        if slate is not None:
            return slate
        popular = await read_slate(self._client, POPULAR_KEY)
        if popular is None:
            raise UnknownUser(
                f"no slate for user {user_id[:256]!r} in Redis at {self._client.address}, and no popular one yet: "
                f"a worker (`millrace run`) writes the first with its first events"
            )
        return msgspec.structs.replace(popular, user_id=user_id)

    async def check(self) -> None:
        """Return when Redis answers. Raises StoreUnavailable, StoreError."""
        await self._client.call("EXISTS", POPULAR_KEY)

    async def aclose(self) -> None:
        await self._client.aclose()
