"""Which deployment the keys under a prefix belong to, and which topic the rings' offsets.

Two deployments that share keys would answer with each other's slates, and a topic that was created again has the old
one's offsets for other events. Both are noted in Redis, which may lose the notes together with the rings: every push
writes them again where they are missing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from worker.config import Config
from worker.errors import ConfigError, MillraceError
from worker.redis.client import Command, RedisClient


class Claim(NamedTuple):
    """A key whose value this process relies on. refusal: makes the error of another value."""

    key: str
    value: str
    refusal: Callable[[str], MillraceError]

    @property
    def command(self) -> Command:
        """Write the value unless there is one, and reply with that."""
        return "SET", self.key, self.value, "NX", "GET"

    def check(self, reply: bytes | None) -> None:
        """Raise the refusal if the key has another value."""
        found = self.value if reply is None else reply.decode(errors="replace")
        if found != self.value:
            raise self.refusal(found)


class Claims:
    """The claims of one process."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._claims: list[Claim] = []

    async def add(self, claim: Claim) -> None:
        """Make a claim, and keep it up from now on. Raises its refusal, StoreError."""
        claim.check(await self._client.call(*claim.command))
        self._claims.append(claim)

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Run the commands as `RedisClient.pipeline` does, and write claims again that Redis has lost.

        Raises the refusal of a claim that is no longer this process's; then the commands have run.
        """
        claims = self._claims if commands else []
        replies = await self._client.pipeline([*(claim.command for claim in claims), *commands])
        for claim, reply in zip(claims, replies, strict=False):
            claim.check(reply)
        return replies[len(claims) :]


async def claim_keys(claims: Claims, client: RedisClient, config: Config) -> None:
    """Note that this deployment owns the keys under its prefix. ConfigError when they are another's; StoreError.

    A deployment is a consumer group and its events topic. Renaming either needs another prefix, or the key deleted.
    """
    ours = f"group {config.kafka.group_id}, topic {config.kafka.events_topic}"
    key = client.keys.owner

    def refusal(owner: str) -> ConfigError:
        return ConfigError(
            f"the keys in Redis at {client.address} under redis.prefix {client.keys.prefix!r} belong to {owner}, this "
            f"is {ours}; set another redis.prefix, or delete {key} to take them over"
        )

    await claims.add(Claim(key, ours, refusal))
