"""Which deployment the keys under a prefix belong to: two that share them would answer with each other's slates."""

from worker.config import Config
from worker.errors import ConfigError
from worker.redis.client import RedisClient


async def claim_keys(client: RedisClient, config: Config) -> None:
    """Note that this deployment owns the keys under its prefix. ConfigError when they are another's; StoreError.

    A deployment is a consumer group and its events topic. Renaming either needs another prefix, or the key deleted.
    """
    ours = f"group {config.kafka.group_id}, topic {config.kafka.events_topic}"
    key = client.keys.owner
    owner = await client.set_if_absent(key, ours)
    if owner != ours:
        raise ConfigError(
            f"the keys in Redis at {client.address} under redis.prefix {client.keys.prefix!r} belong to {owner}, this "
            f"is {ours}; set another redis.prefix, or delete {key} to take them over"
        )
