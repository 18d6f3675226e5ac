"""Find out why no connection to Redis comes about: redis-py only sees silence, or a closed connection."""

from worker.errors import StoreError, StoreUnavailable
from worker.system.listener import accepts_tls, first_bytes

QUESTION = b"PING\r\n"  # a server that expects a login, or that is full, answers it, too
TLS_INSTEAD = "TLS; write rediss:// instead of redis://"
NO_TLS_INSTEAD = "no TLS; write redis:// instead of rediss://"
REPLIES = (b"+", b"-")  # how an answer of Redis to it begins


async def find_mismatch(host: str, port: int, wants_tls: bool) -> StoreError | None:
    """Return what is wrong with the listener and the next step; None when it is silent, away, or as configured."""
    try:
        answer = await first_bytes(host, port, QUESTION)
        if answer is None:
            return None
        speaks_redis = answer.startswith(REPLIES)
        speaks_tls = not speaks_redis and await accepts_tls(host, port)
    except OSError:
        return None
    where = f"Redis at {host}:{port}"
    if speaks_redis or speaks_tls:
        if speaks_tls == wants_tls:
            return None
        return StoreError(f"{where} speaks {TLS_INSTEAD if speaks_tls else NO_TLS_INSTEAD} in redis.url")
    if answer:
        return StoreError(f"{where} does not speak Redis's protocol: another service listens there; set redis.url")
    return StoreUnavailable(
        f"{where} closes the connection at the first command: what listens there does not speak Redis's protocol, or "
        "is a proxy whose server is away; set redis.url, or start the server"
    )
