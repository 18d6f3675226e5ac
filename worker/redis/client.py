"""A Redis client with one deadline per pipeline, server-side functions that are always loaded, and typed errors.

redis-py would wait 5 s and try 10 times before it reports that a server is down; here a call takes at most
`redis.timeout_s` and is tried once, because the callers decide what may be retried.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import hiredis
from redis import exceptions as redis_errors
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from worker import logging
from worker.backoff import Backoff
from worker.config import RedisConfig
from worker.errors import ConfigError, StoreError, StoreUnavailable
from worker.interfaces import Clock
from worker.redis.diagnosis import find_mismatch
from worker.redis.functions import LIBRARIES
from worker.redis.keys import Keys
from worker.redis.url import WANT, check_url

log = logging.get("redis")
START_BACKOFF = Backoff(first_s=0.5, cap_s=4.0)  # a server that comes up is noticed soon, a dead one is not hammered
FUNCTION_NOT_FOUND = "Function not found"  # after a restart without persistence, or failover to a replica without it
# Error replies that pass by themselves or after an operator's action: code -> predicate of the error message.
TRANSIENT_ERRORS = {
    "OOM": "is out of memory: raise its maxmemory, or lower sequences.max_events or sequences.ttl_days",
    "READONLY": "is a read-only replica: a failover is under way, or redis.url names a replica",
    "LOADING": "is still loading its data",
    "CLUSTERDOWN": "reports that its cluster is down",
    "MASTERDOWN": "has lost its primary",
    "TRYAGAIN": "is moving hash slots",
    "MISCONF": "cannot save to its disk and so rejects writes",
    "NOREPLICAS": "has too few replicas to accept writes",
    "BUSY": "is busy with another function",
}
# Parts of errors that a wrong configuration brings -> predicate of the error message, with the next step.
MISCONFIGURED = {
    "Cluster mode is not enabled": "is not a cluster: set redis.cluster = false, or redis.url to a node of the cluster",
    "DB index is out of range": "has no such database: set the number at the end of redis.url, or raise `databases`",
}
DEFAULT_HOST = "localhost"
DEFAULT_PORT = 6379

Command = tuple[str | bytes | int | float, ...]
T = TypeVar("T")
# hiredis declares a one-element tuple, and accepts any.
_pack = cast(Callable[[Command], bytes], hiredis.pack_command)


class RedisClient:
    """One server or one cluster. Every method raises StoreUnavailable (may be retried) or StoreError."""

    def __init__(self, config: RedisConfig, prefix: str = "") -> None:
        """Connect at the first call. Raises ConfigError for an invalid URL.

        prefix: of the deployment's keys
        """
        self.keys = Keys(prefix)
        self._timeout_s = config.timeout_s
        self._cluster: RedisCluster | None = None
        # RESP2: no feature of RESP3 is used. No socket timeouts: one deadline per pipeline, not one per reply.
        options: dict[str, Any] = {
            "socket_timeout": None,
            "socket_connect_timeout": config.timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        check_url(config.url)
        try:
            self._pool = ConnectionPool.from_url(config.url, **options)
            if config.cluster:
                self._check_database()
                self._cluster = RedisCluster.from_url(config.url, **options)
        except (ValueError, TypeError, redis_errors.RedisError, redis_errors.RedisClusterException) as error:
            # Not the error's text: it may quote the URL.
            raise ConfigError(f"redis.url: {type(error).__name__} from its options; {WANT}") from None
        connection = self._pool.connection_kwargs
        self.address = (
            connection.get("path") or f"{connection.get('host', DEFAULT_HOST)}:{connection.get('port', DEFAULT_PORT)}"
        )

    def _check_database(self) -> None:
        if database := self._pool.connection_kwargs.get("db"):
            raise ConfigError(
                f"redis.url: it names database {database}, and a cluster has only 0; leave it out, or set "
                "redis.cluster = false"
            )

    async def call(self, *command: str | bytes | int | float) -> Any:
        """Return one command's reply, undecoded."""
        return (await self.pipeline([command]))[0]

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies in order. One round trip, no transaction: if it raises, some commands may have run.

        A function that the server has lost is loaded again, and its calls are repeated.
        """
        replies = await self.replies(commands)
        for reply in replies:
            if isinstance(reply, StoreError):
                raise reply
        return replies

    async def replies(self, commands: Sequence[Command]) -> list[Any]:
        """Return what `pipeline` does; a command that the server refused has its StoreError in its reply's place.

        Raises an error that concerns more than a key: no connection, a lost reply, missing permissions. Then it is
        unknown which commands have run.
        """
        if not commands:
            return []
        replies = await self._with_deadline(self._send(commands))
        failed = [index for index, reply in enumerate(replies) if isinstance(reply, Exception)]
        without_function = [index for index in failed if FUNCTION_NOT_FOUND in str(replies[index])]
        if without_function:
            await self.load_functions()
            repeated = await self._with_deadline(self._send([commands[index] for index in without_function]))
            for index, reply in zip(without_function, repeated, strict=True):
                replies[index] = reply
        for index in failed:
            if isinstance(error := replies[index], Exception):
                replies[index] = self._error(error)
                if not isinstance(error, redis_errors.ResponseError) or _concerns_all_keys(error):
                    raise replies[index]
        return replies

    async def find_mismatch(self) -> StoreError | None:
        """Return in which way the listener is not what `redis.url` says; None when that is not the problem."""
        connection = self._pool.connection_kwargs
        if "path" in connection:  # a socket file
            return None
        wants_tls = issubclass(self._pool.connection_class, SSLConnection)
        host = connection.get("host", DEFAULT_HOST)
        return await find_mismatch(host, connection.get("port", DEFAULT_PORT), wants_tls)

    @property
    def is_cluster(self) -> bool:
        return self._cluster is not None

    def node_of(self, key: str) -> str:
        """Return the name of the cluster's node that holds the key, as far as known; "" on a single server."""
        try:
            node = None if self._cluster is None else self._cluster.get_node_from_key(key)
        except redis_errors.SlotNotCoveredError:  # not connected yet, or no node has the slot
            node = None
        return "" if node is None else node.name

    async def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO of the node that redis.url names."""
        return await self._with_deadline(Redis(connection_pool=self._pool).info(section))

    async def load_functions(self) -> None:
        """Run FUNCTION LOAD REPLACE on every primary. Raises StoreError when the server has no functions."""
        for library in LIBRARIES:
            load: Command = ("FUNCTION", "LOAD", "REPLACE", library.code)
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
            raise StoreUnavailable(
                f"Redis at {self.address} did not answer within {self._timeout_s:g} s; see its load and its log, or "
                "set redis.url or redis.timeout_s"
            ) from error
        except (redis_errors.RedisError, redis_errors.RedisClusterException, OSError) as error:
            await self._rediscover()
            raise self._error(error) from error

    async def _rediscover(self) -> None:
        """Make a cluster's client discover the nodes again at its next use."""
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies, errors that the server replied among them; raise when the connection fails."""
        if self._cluster is not None:
            pipeline = self._cluster.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute(raise_on_error=False)
        # redis-py's own pipeline packs in Python: 17 us more per command than hiredis (500 pushes, one EPYC core).
        connection = await self._pool.get_connection()
        try:
            await connection.send_packed_command(b"".join(map(_pack, commands)))
            return await _read_replies(connection, len(commands))
        finally:
            await self._pool.release(connection)

    def _error(self, error: Exception) -> StoreError:
        code = getattr(error, "status_code", None) or str(error).split(" ", 1)[0]
        if code in TRANSIENT_ERRORS:
            return StoreUnavailable(f"Redis at {self.address} {TRANSIENT_ERRORS[code]} ({error})")
        where = f"Redis at {self.address}"
        text = str(error).rstrip(".")
        if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError):
            return StoreError(
                f"{where} rejects the credentials of redis.url ({text}); set its user and password, leave them out "
                "where Redis has none, or give the user the permission with ACL SETUSER"
            )
        if "unknown command" in text and "FUNCTION" in text:
            return StoreError(f"{where} has no functions ({text}); run Redis 7 or Valkey")
        if isinstance(error, redis_errors.MovedError) and self._cluster is None:
            return StoreError(f"{where} is a node of a cluster (MOVED {text}); set redis.cluster = true")
        for part, explanation in MISCONFIGURED.items():
            if part in text:
                return StoreError(f"{where} {explanation} ({text})")
        if isinstance(error, redis_errors.ResponseError):
            return StoreError(f"{where} rejected a command ({text}); see its log, its version and redis.url")
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return StoreUnavailable(
                f"{where} has a certificate that is not trusted ({text}); set ssl_ca_certs in redis.url to the file of "
                "its authority, and the host to a name that it is for"
            )
        return StoreUnavailable(f"{where} is unreachable ({text}); start it or set redis.url")


async def _read_replies(connection: Any, count: int) -> list[Any]:
    """Return the next replies, errors that the server replied among them; raise when the connection fails."""
    # NOTE: private in redis-py 8.0: the connection's `_parser` and its hiredis `_reader`, which holds the replies that
    # a read from the socket brought. `read_response` takes 5 us for each of them, most of it to wait for nothing.
    buffered = connection._parser._reader
    replies: list[Any] = []
    while len(replies) < count:
        reply = buffered.gets()
        if reply is NOT_ENOUGH_DATA:
            try:
                reply = await connection.read_response()
            except redis_errors.ResponseError as error:
                reply = error
        if isinstance(reply, redis_errors.ConnectionError):
            raise reply
        replies.append(reply)
    return replies


def _concerns_all_keys(error: redis_errors.ResponseError) -> bool:
    return isinstance(error, redis_errors.NoPermissionError) or "unknown command" in str(error)


async def connect_at_start(
    config: RedisConfig, prefix: str, clock: Clock, report: Callable[[str], None]
) -> RedisClient:
    """Return a client whose functions are loaded, waiting for a server that is away. Same errors as `connect`.

    report: called with the reason of each failed attempt, and with "" at the end

    Raises StoreUnavailable after `start_timeout_s`.
    """
    give_up_s = clock.monotonic() + config.start_timeout_s
    delays_s = START_BACKOFF.delays()
    while True:
        try:
            client = await connect(config, prefix)
        except StoreUnavailable as error:
            delay_s = next(delays_s)
            if clock.monotonic() + delay_s >= give_up_s:
                raise
            report(str(error))
            log.warning("Redis is not ready", error=str(error), delay_s=delay_s)
            await asyncio.sleep(delay_s)
        else:
            report("")
            return client


async def connect(config: RedisConfig, prefix: str = "") -> RedisClient:
    """Return a client whose functions are loaded. Raises ConfigError, StoreUnavailable, StoreError."""
    client = RedisClient(config, prefix)
    try:
        await client.load_functions()
    except BaseException as error:
        await client.aclose()
        if isinstance(error, StoreUnavailable) and (mismatch := await client.find_mismatch()):
            raise mismatch from error
        raise
    return client
