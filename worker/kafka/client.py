"""What every Kafka client of ours shares: how it connects, what must be there at start, which errors end a process."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from aiokafka import TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.helpers import create_ssl_context
from msgspec.structs import replace

from worker import logging
from worker.config import KafkaConfig
from worker.errors import ConfigError, SourceError, SourceUnavailable
from worker.interfaces import Clock

log = logging.get("kafka")
T = TypeVar("T")
RETRY_S = 0.5  # before the second attempt at start: a broker that is coming up is noticed at once
RETRY_CAP_S = 4.0  # of the back-off: one that is away is not hammered
CLI_START_TIMEOUT_S = 8.0  # `start_timeout_s` of a command that somebody waits for
METADATA_POLL_S = 0.05  # between two looks for what is being made: a topic's leaders, a group's coordinator
DIAGNOSE_TIMEOUT_S = 5.0  # to ask once more why a connection fails
TOPIC_VISIBLE_S = 2.0  # a topic that was just created is not at once known to every broker
PERMANENT_ERRORS = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
    errors.TransactionalIdAuthorizationFailed,
    errors.AuthenticationFailedError,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
    ssl.SSLCertVerificationError,
)


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """Keyword arguments of every aiokafka client. ConfigError when an address, a TLS file or the SASL user is none."""
    try:
        collect_hosts(config.bootstrap_servers)
    except ValueError as error:
        raise ConfigError(
            f"kafka.bootstrap_servers '{config.bootstrap_servers}': want HOST:PORT, several with commas"
        ) from error
    if config.security_protocol.startswith("SASL") and None in (config.sasl_username, config.sasl_password):
        raise ConfigError(f"kafka.security_protocol {config.security_protocol} wants sasl_username and sasl_password")
    return {
        "bootstrap_servers": config.bootstrap_servers,
        "request_timeout_ms": config.request_timeout_ms,
        "security_protocol": config.security_protocol,
        "sasl_mechanism": config.sasl_mechanism,
        "sasl_plain_username": config.sasl_username,
        "sasl_plain_password": config.sasl_password,
        "ssl_context": _ssl_context(config),
    }


def _ssl_context(config: KafkaConfig) -> ssl.SSLContext | None:
    if "SSL" not in config.security_protocol.split("_"):
        return None
    try:
        return create_ssl_context(cafile=config.ssl_cafile, certfile=config.ssl_certfile, keyfile=config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = f"ssl_cafile={config.ssl_cafile}, ssl_certfile={config.ssl_certfile}, ssl_keyfile={config.ssl_keyfile}"
        raise ConfigError(f"kafka: TLS cannot be set up from {files}: {error}") from error


def is_permanent(error: BaseException) -> bool:
    """Would repeating not help, because somebody said no?"""
    return isinstance(error, PERMANENT_ERRORS)


def cli_timeouts(config: KafkaConfig) -> KafkaConfig:
    """For a command at a terminal. The default of `start_timeout_s` suits a deployment, whose broker may come up later
    than the worker; a value that was set is kept."""
    left_alone = config.start_timeout_s == KafkaConfig().start_timeout_s
    return replace(config, start_timeout_s=CLI_START_TIMEOUT_S) if left_alone else config


async def retry_at_start(config: KafkaConfig, clock: Clock, act: Callable[[], Awaitable[T]]) -> T:
    """`act()`, repeated until it succeeds. SourceUnavailable after `start_timeout_s`, SourceError when refused."""
    deadline_s = clock.monotonic() + config.start_timeout_s
    delay_s, said = RETRY_S, ""
    with logging.silenced("aiokafka"):  # which would only say again, at every attempt, that there is no connection
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline_s - clock.monotonic())):
                    return await act()
            except (errors.KafkaError, OSError, TimeoutError) as raised:
                error = await _diagnose(config, raised)
            left_s = deadline_s - clock.monotonic() - RETRY_S  # the last attempt has RETRY_S, too
            _raise_if_final(config, error, left_s)
            if _describe(error) != said:
                said = _describe(error)
                log.warning("Kafka is not ready", bootstrap=config.bootstrap_servers, error=said)
            await asyncio.sleep(min(delay_s, left_s))
            delay_s = min(2 * delay_s, RETRY_CAP_S)


def _raise_if_final(config: KafkaConfig, error: Exception, left_s: float) -> None:
    """Raises when repeating would not help, or there is no time left for it."""
    if is_permanent(error):
        raise SourceError(
            f"kafka {config.bootstrap_servers} refuses this client: {_describe(error)}; see kafka.sasl_* and"
            " kafka.ssl_*"
        ) from error
    if left_s <= 0:
        raise SourceUnavailable(
            f"no answer from Kafka at {config.bootstrap_servers} within {config.start_timeout_s:g} s "
            f"({_describe(error)}); start the broker, or set kafka.bootstrap_servers, "
            f"kafka.security_protocol or kafka.start_timeout_s"
        ) from error


async def with_admin(config: KafkaConfig, clock: Clock, question: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
    """The cluster's answer, asked for as `at_start` does."""

    async def once() -> T:
        admin = AIOKafkaAdminClient(**client_options(config))
        try:
            await admin.start()
            return await question(admin)
        finally:
            await admin.close()

    return await retry_at_start(config, clock, once)


async def list_partitions(config: KafkaConfig, clock: Clock, topic: str) -> list[TopicPartition]:
    """The topic's partitions, none when it is not there. Asks for the list of all topics first, for a broker may create
    one that is asked for by name. SourceError, SourceUnavailable."""

    async def described(admin: AIOKafkaAdminClient) -> list[TopicPartition]:
        if topic not in await admin.list_topics():
            return []
        (found,) = await admin.describe_topics([topic])
        return [TopicPartition(topic, entry["partition"]) for entry in found["partitions"]]

    return await with_admin(config, clock, described)


async def _diagnose(config: KafkaConfig, error: Exception) -> Exception:
    """Why no connection can be had: aiokafka only logs it."""
    if not isinstance(error, errors.KafkaConnectionError):
        return error
    options = client_options(config)
    host, port, _ = collect_hosts(options.pop("bootstrap_servers"))[0]
    try:
        async with asyncio.timeout(DIAGNOSE_TIMEOUT_S):
            (await create_conn(host, port, **options)).close()
    except (errors.KafkaError, OSError, TimeoutError) as cause:
        return cause
    return error


async def ensure_topics(config: KafkaConfig, clock: Clock, topics: Sequence[str]) -> None:
    """Returns when all of the topics are there, made by us when `create_topics` is on; else SourceError names what is
    missing. Asks for the list of all topics, for a broker may create one that is asked for by name."""
    wait_until_s: float | None = None

    async def check(admin: AIOKafkaAdminClient) -> None:
        nonlocal wait_until_s
        if missing := set(topics) - set(await admin.list_topics()):
            wait_until_s = wait_until_s or clock.monotonic() + TOPIC_VISIBLE_S
            if not config.create_topics and clock.monotonic() < wait_until_s:
                raise errors.UnknownTopicOrPartitionError(", ".join(sorted(missing)))
            await _create(admin, config, sorted(missing))

    await with_admin(config, clock, check)


async def ensure_coordinator(config: KafkaConfig, clock: Clock, group: str) -> None:
    """Returns when the group's coordinator answers: it may still be loading, and a cluster's first group waits until
    the topic of offsets is made. SourceError, SourceUnavailable."""

    # NOTE: aiokafka 0.14 reads a coordinator that is loading as one that knows no offsets and no members.
    async def check(admin: AIOKafkaAdminClient) -> None:
        while (error := await _coordinator_error(admin, group)) is not None:
            if not error.retriable:
                raise error
            await asyncio.sleep(METADATA_POLL_S)

    await with_admin(config, clock, check)


async def _coordinator_error(admin: AIOKafkaAdminClient, group: str) -> errors.KafkaError | None:
    try:
        (answer,) = await admin.describe_consumer_groups([group])
    except errors.GroupCoordinatorNotAvailableError as error:
        return error
    (described,) = answer.to_object()["groups"]
    error = errors.for_code(described["error_code"])
    return None if error is errors.NoError else error(group)


async def _create(admin: AIOKafkaAdminClient, config: KafkaConfig, missing: Sequence[str]) -> None:
    if not config.create_topics:
        commands = "; ".join(
            f"kafka-topics.sh --create --topic {topic} --partitions {config.partitions} "
            f"--bootstrap-server {config.bootstrap_servers}"
            for topic in missing
        )
        raise SourceError(
            f"topic {', '.join(missing)} is not on {config.bootstrap_servers}, or not visible to this client; create "
            f"it ({commands}), or set kafka.create_topics = true"
        )
    wanted = [NewTopic(topic, config.partitions, config.replication_factor) for topic in missing]
    response = (await admin.create_topics(wanted)).to_object()
    for topic in response["topic_errors"]:
        error = errors.for_code(topic["error_code"])
        if error not in (errors.NoError, errors.TopicAlreadyExistsError):
            raise _creation_error(error, f"topic {topic['topic']} cannot be created: {topic.get('error_message')}")
    while not all(map(_has_leaders, await admin.describe_topics(list(missing)))):  # noqa: ASYNC110 - nobody tells us
        await asyncio.sleep(METADATA_POLL_S)
    log.info("topics created", topics=list(missing), partitions=config.partitions)


def _has_leaders(topic: Mapping[str, Any]) -> bool:
    """Has each of its partitions a leader? A client that asks earlier finds no topic and logs an error."""
    return not topic["error_code"] and all(partition["leader"] >= 0 for partition in topic["partitions"])


def _creation_error(error: type[errors.KafkaError], text: str) -> Exception:
    """A retriable one is left to `at_start`."""
    return error(text) if error.retriable else SourceError(f"{text} ({error.__name__}); see kafka.replication_factor")


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
