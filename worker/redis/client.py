"""Redis as this project needs it: pipelines with one deadline, functions that are always there, errors by name.

redis-py would wait 5 s and try 10 times before it says that a server is gone; here a call takes at most
`redis.timeout_s` and is tried once, since the callers know what may be repeated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker.config import RedisConfig as RedisConfig
from worker.errors import ConfigError, StoreError, StoreUnavailable

LIBRARIES = [Path(__file__).with_name(name) for name in ("sequences.lua", "slates.lua", "counters.lua")]
POPULAR_KEY = "rec:popular"
NOT_FOUND = "Function not found"  # a restart without persistence, a failover to a replica that had not got it
# Error replies that pass by themselves or by an operator's hand: code -> what is the matter.
TRANSIENT_ERRORS = {
    "OOM": "is out of memory: raise its maxmemory, or lower sequences.max_events or sequences.ttl_days",
    "READONLY": "is a read-only replica: a failover is under way, or redis.url names a replica",
    "LOADING": "is still loading its data",
    "CLUSTERDOWN": "says that its cluster is down",
    "MASTERDOWN": "has lost its primary",
    "TRYAGAIN": "is moving hash slots",
    "MISCONF": "cannot save to its disk and so refuses writes",
    "NOREPLICAS": "has too few replicas to accept writes",
    "BUSY": "is busy with another function",
}

Command = tuple[str | bytes | int | float, ...]
T = TypeVar("T")
# hiredis declares a tuple of one, and takes any.
_pack = cast(Callable[[Command], bytes], hiredis.pack_command)


def ring_key(user_id: str) -> str:
    return f"seq:{{u:{user_id}}}"


def slate_key(user_id: str) -> str:
    return f"rec:{{u:{user_id}}}"


class RedisClient:
    """One server, or a cluster of them. Every method raises StoreUnavailable (may be retried) or StoreError."""

    def __init__(self, config: RedisConfig) -> None:
        self._timeout_s = config.timeout_s
        self._cluster: RedisCluster | None = None
        # RESP2: nothing of RESP3 is used here. No socket timeouts: one deadline a pipeline, not one a reply.
        options: dict[str, Any] = {
            "socket_timeout": None,
            "socket_connect_timeout": config.timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        try:
            if config.cluster:
                self._cluster = RedisCluster.from_url(config.url, **options)
            self._pool = ConnectionPool.from_url(config.url, **options)
        except (ValueError, redis_errors.RedisError, redis_errors.RedisClusterException) as error:
            raise ConfigError(f"redis.url: {error}; want redis://HOST:PORT/DB or rediss://...") from error
        where = self._pool.connection_kwargs
        self.address = where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"

    async def call(self, *command: str | bytes | int | float) -> Any:
        """One command's reply, undecoded."""
        return (await self.pipeline([command]))[0]

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """The replies in order. One round trip, no transaction: when this raises, some may have been carried out.

        A function that the server has lost is loaded again, and its calls are repeated.
        """
        if not commands:
            return []
        replies = await self._with_deadline(self._send(commands))
        errors = [at for at, reply in enumerate(replies) if isinstance(reply, Exception)]
        lost = [at for at in errors if NOT_FOUND in str(replies[at])]
        if lost:
            await self.load_functions()
            for at, reply in zip(
                lost, await self._with_deadline(self._send([commands[at] for at in lost])), strict=True
            ):
                replies[at] = reply
        for at in errors:
            if isinstance(replies[at], Exception):
                raise self._error(replies[at])
        return replies

    async def info(self, section: str) -> dict[str, Any]:
        """A section of INFO, of the node that redis.url names."""
        return await self._with_deadline(Redis(connection_pool=self._pool).info(section))

    async def load_functions(self) -> None:
        """FUNCTION LOAD REPLACE, on every primary. Raises StoreError where the server has no functions."""
        for path in LIBRARIES:
            load: Command = ("FUNCTION", "LOAD", "REPLACE", path.read_text())
            if self._cluster is not None:
                reply = self._cluster.execute_command("FUNCTION LOAD", *load[2:], target_nodes=RedisCluster.PRIMARIES)
                await self._with_deadline(reply)
            elif isinstance(reply := (await self._with_deadline(self._send([load])))[0], Exception):
                raise self._error(reply)

    async def aclose(self) -> None:
        await self._pool.aclose()
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _with_deadline(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call
        except TimeoutError as error:
            await self._rediscover()
            raise StoreUnavailable(f"Redis at {self.address} did not answer within {self._timeout_s:g} s") from error
        except (redis_errors.RedisError, redis_errors.RedisClusterException, OSError) as error:
            await self._rediscover()
            raise self._error(error) from error

    async def _rediscover(self) -> None:
        """A cluster's client asks for the nodes anew at its next use."""
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        """Replies, or the errors that the server replied; raises when the connection fails."""
        if self._cluster is not None:
            pipeline = self._cluster.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute(raise_on_error=False)
        # redis-py's own pipeline packs in Python: 17 us more a command than hiredis (500 pushes, one core of an EPYC).
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(b"".join(map(_pack, commands)))
            replies: list[Any] = []
            for _ in commands:
                try:
                    replies.append(await connection.read_response())
                except redis_errors.ResponseError as error:
                    replies.append(error)
            return replies
        finally:
            await self._pool.release(connection)

    def _error(self, error: Exception) -> StoreError:
        code = getattr(error, "status_code", None) or str(error).split(" ", 1)[0]
        if code in TRANSIENT_ERRORS:
            return StoreUnavailable(f"Redis at {self.address} {TRANSIENT_ERRORS[code]} ({error})")
        if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
            return StoreError(f"Redis at {self.address} refuses the credentials of redis.url: {error}")
        if "unknown command" in str(error) and "FUNCTION" in str(error):
            return StoreError(f"Redis at {self.address} has no functions: Redis 7 or Valkey is needed ({error})")
        if isinstance(error, redis_errors.ResponseError):
            return StoreError(f"Redis at {self.address} refused a command: {error}")
        return StoreUnavailable(f"Redis at {self.address} is away: {error}")


async def connect(config: RedisConfig) -> RedisClient:
    """A client with its functions loaded. Raises ConfigError, StoreUnavailable, StoreError."""
    client = RedisClient(config)
    try:
        await client.load_functions()
    except BaseException:
        await client.aclose()
        raise
    return client
