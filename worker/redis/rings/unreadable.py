"""Set keys aside that should hold a ring and do not: one of them must not halt every worker that reads its user."""

from collections.abc import Iterable

from worker import logging, metrics
from worker.redis.client import RedisClient
from worker.redis.rings.ring import HEADER, PREFIX, Ring

log = logging.get("sequences")
# First byte of rings of other versions: they halt the worker instead, since two versions must not share rings.
FORMATS = range(1, 10)


async def set_unreadable_aside(client: RedisClient, user_ids: Iterable[str]) -> list[str]:
    """Rename these users' keys that hold no ring of any version; return their old names. StoreError."""
    users = sorted(set(user_ids))
    types = await client.pipeline([("TYPE", client.keys.ring(user)) for user in users])
    unreadable = [user for user, kind in zip(users, types, strict=True) if kind not in (b"string", b"none")]
    strings = [user for user, kind in zip(users, types, strict=True) if kind == b"string"]
    values = await client.pipeline([("GET", client.keys.ring(user)) for user in strings])
    unreadable += [user for user, value in zip(strings, values, strict=True) if _is_unreadable(value or b"")]
    await client.pipeline([("RENAME", client.keys.ring(user), client.keys.unreadable(user)) for user in unreadable])
    for user in unreadable:
        metrics.UNREADABLE_RINGS.inc()
        log.error(
            "a key holds no ring: it was renamed, the user's ring starts again from this event",
            key=client.keys.unreadable(user),
        )
    return [client.keys.ring(user) for user in unreadable]


def _is_unreadable(value: bytes) -> bool:
    is_of_another_version = len(value) >= HEADER.size and value[0] in FORMATS and value[1] and value[1] % 8 == 0
    try:
        Ring.from_value(value, 1)
    except ValueError:
        return not is_of_another_version or value[:2] == PREFIX
    return False
