"""Connect to Kafka: client options, retries at start, topics, group coordinators."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.helpers import create_ssl_context
from msgspec.structs import replace

from worker import logging
from worker.backoff import Backoff
from worker.config import KafkaConfig
from worker.deadline import Deadline
from worker.errors import ConfigError, SourceError, SourceUnavailable
from worker.interfaces import Clock
from worker.kafka.diagnosis import Diagnosis, diagnose
from worker.kafka.error_causes import NOT_READY, Cause, cause_of, describe, explain, is_permanent

log = logging.get("kafka")
T = TypeVar("T")
# At start: a broker that is coming up is noticed at once, one that stays down is not hammered.
START_BACKOFF = Backoff(first_s=0.5, cap_s=4.0)
CLI_START_TIMEOUT_S = 8.0  # `start_timeout_s` of an interactive command
STOP_S = 10.0
METADATA_POLL_S = 0.05  # between polls of cluster metadata: a new topic's leaders, a group's coordinator
TOPIC_VISIBLE_S = 2.0  # until a topic that was just created is visible on every broker
SILENT_S = 2.0  # a healthy broker answers far sooner; without an answer the address is tried, beside the attempt
CREATION_STEPS: dict[type[errors.KafkaError], str] = {
    errors.InvalidReplicationFactorError: "set kafka.replication_factor to at most the number of brokers",
    errors.InvalidPartitionsError: "set kafka.partitions",
    errors.InvalidTopicError: "name another topic in the section kafka",
}


def client_options(config: KafkaConfig) -> dict[str, Any]:
    """Return the keyword arguments that all aiokafka clients share.

    Raises ConfigError for an unreadable TLS file, and for SASL without user and password or without its library.
    """
    if config.security_protocol.startswith("SASL"):
        _check_login(config)
    return {
        "bootstrap_servers": config.bootstrap_servers,
        "request_timeout_ms": config.request_timeout_ms,
        "security_protocol": config.security_protocol,
        "sasl_mechanism": config.sasl_mechanism,
        "sasl_plain_username": config.sasl_username,
        "sasl_plain_password": config.sasl_password,
        "ssl_context": _ssl_context(config),
    }


def _check_login(config: KafkaConfig) -> None:
    if config.sasl_mechanism == "GSSAPI":  # its user is that of the Kerberos ticket
        if find_spec("gssapi") is None:
            raise ConfigError(
                "kafka.sasl_mechanism GSSAPI: the Python package `gssapi` is missing; run `pip install gssapi`, which "
                "needs the Kerberos libraries, or set another kafka.sasl_mechanism"
            )
    elif None in (config.sasl_username, config.sasl_password):
        raise ConfigError(
            f"kafka.security_protocol {config.security_protocol}: set kafka.sasl_username and kafka.sasl_password"
        )


def _ssl_context(config: KafkaConfig) -> ssl.SSLContext | None:
    if "SSL" not in config.security_protocol.split("_"):
        return None
    try:
        return create_ssl_context(cafile=config.ssl_cafile, certfile=config.ssl_certfile, keyfile=config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = f"ssl_cafile={config.ssl_cafile}, ssl_certfile={config.ssl_certfile}, ssl_keyfile={config.ssl_keyfile}"
        raise ConfigError(f"kafka: TLS set-up from {files} failed: {error}") from error


def is_transient(error: errors.KafkaError) -> bool:
    """Whether a retry may succeed."""
    return (error.retriable or isinstance(error, errors.KafkaTimeoutError)) and not is_permanent(error)


def source_error(config: KafkaConfig, topic: str, error: errors.KafkaError) -> SourceError:
    """Return an error of a read as one of the worker's: SourceUnavailable when a retry may succeed."""
    kind = SourceUnavailable if is_transient(error) else SourceError
    return kind(explain(config, error, topic))


def raise_unless_transient(config: KafkaConfig, error: errors.KafkaError, topic: str) -> None:
    """Log an error that a retry may fix. Raises SourceError at any other."""
    if not is_transient(error):
        raise SourceError(explain(config, error, topic)) from error
    log.warning("transient error, retrying", error=repr(error))


def cli_timeouts(config: KafkaConfig) -> KafkaConfig:
    """Shorten `start_timeout_s` for a command at a terminal; a value that was set is kept.

    The default suits a deployment, whose broker may come up later than the worker.
    """
    is_default = config.start_timeout_s == KafkaConfig().start_timeout_s
    return replace(config, start_timeout_s=CLI_START_TIMEOUT_S) if is_default else config


async def retry_at_start(config: KafkaConfig, clock: Clock, operation: Callable[[], Awaitable[T]]) -> T:
    """Retry `operation()` until it succeeds, and return its result.

    Raises SourceUnavailable after `start_timeout_s`, SourceError at a permanent error.
    """
    deadline_s = clock.monotonic() + config.start_timeout_s
    delays_s = START_BACKOFF.delays()
    logged: Cause | None = None

    def report(diagnosis: Diagnosis) -> None:
        nonlocal logged
        if diagnosis.cause != logged:
            logged = diagnosis.cause
            log.warning("Kafka is not ready", error=describe(config, *diagnosis))

    with logging.silenced("aiokafka"):  # it would log the same connection error on every attempt
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline_s - clock.monotonic())):
                    return await _attempt(config, operation, report)
            except (errors.KafkaError, OSError, TimeoutError) as raised:
                error = raised
            diagnosis = await diagnose(client_options(config), error)
            # The first delay's length remains for the last attempt.
            left_s = deadline_s - clock.monotonic() - START_BACKOFF.first_s
            _raise_if_final(config, diagnosis, error, left_s)
            report(diagnosis)
            await asyncio.sleep(min(next(delays_s), left_s))


async def _attempt(
    config: KafkaConfig, operation: Callable[[], Awaitable[T]], report: Callable[[Diagnosis], None]
) -> T:
    """Return the result of `operation()`; look for the reason meanwhile when it takes long.

    Otherwise a listener of another service, which waits for the end of its own kind of request, would be noticed only
    after `request_timeout_ms`. Raises SourceError when the reason is permanent.
    """
    attempt = asyncio.ensure_future(operation())
    try:
        done, _ = await asyncio.wait([attempt], timeout=SILENT_S)
        if not done:
            silence = TimeoutError(f"no answer within {SILENT_S:g} s")
            diagnosis = await diagnose(client_options(config), silence)
            if diagnosis.cause.is_permanent:
                raise SourceError(describe(config, *diagnosis))
            if diagnosis.cause is not NOT_READY:  # a group may take a minute to form: nothing is wrong
                report(diagnosis)
        return await attempt
    finally:
        if not attempt.done():
            attempt.cancel()
            await asyncio.wait([attempt])


def _raise_if_final(config: KafkaConfig, diagnosis: Diagnosis, error: Exception, left_s: float) -> None:
    """Raise when the error is permanent or the time is up."""
    if diagnosis.cause.is_permanent:
        raise SourceError(describe(config, *diagnosis)) from error
    if left_s <= 0:
        waited = f"for {config.start_timeout_s:g} s: {diagnosis.detail}"
        raise SourceUnavailable(describe(config, diagnosis.cause, waited)) from error


async def with_admin(config: KafkaConfig, clock: Clock, query: Callable[[AIOKafkaAdminClient], Awaitable[T]]) -> T:
    """Return the result of `query(admin)`, with the retries and errors of `retry_at_start`."""

    async def attempt() -> T:
        admin = AIOKafkaAdminClient(**client_options(config))
        try:
            await admin.start()
            return await query(admin)
        finally:
            await admin.close()

    return await retry_at_start(config, clock, attempt)


async def stop_client(client: AIOKafkaConsumer | AIOKafkaProducer, clock: Clock) -> None:
    """Stop a client, within STOP_S. Its errors are not raised: they would replace the one that ended its use.

    aiokafka's consumer raises CancelledError when a broker that went silent has left one of its fetches waiting.
    """
    if not await Deadline(clock).finish(client.stop(), STOP_S):
        log.warning("a Kafka client did not stop cleanly: its connections end with this process")


async def list_partitions(config: KafkaConfig, clock: Clock, topic: str) -> list[TopicPartition]:
    """Return the topic's partitions, none when it does not exist. Raises SourceError, SourceUnavailable.

    Lists all topics first, because a broker may create a topic that is requested by name.
    """

    async def query(admin: AIOKafkaAdminClient) -> list[TopicPartition]:
        if topic not in await admin.list_topics():
            return []
        (described,) = await admin.describe_topics([topic])
        return [TopicPartition(topic, entry["partition"]) for entry in described["partitions"]]

    return await with_admin(config, clock, query)


async def ensure_topics(config: KafkaConfig, clock: Clock, topics: Sequence[str]) -> None:
    """Return when all topics exist, creating them when `create_topics` is on.

    Lists all topics, because a broker may create a topic that is requested by name. Raises SourceUnavailable, and
    SourceError that names the missing topics.
    """
    deadline_s: float | None = None

    async def check(admin: AIOKafkaAdminClient) -> None:
        nonlocal deadline_s
        missing = sorted(set(topics) - set(await admin.list_topics()))
        if not missing:
            return
        if config.create_topics:
            await _create_topics(admin, config, missing)
            return
        deadline_s = deadline_s or clock.monotonic() + TOPIC_VISIBLE_S
        if clock.monotonic() < deadline_s:
            raise errors.UnknownTopicOrPartitionError(", ".join(missing))
        raise _missing_topics_error(config, missing)

    await with_admin(config, clock, check)


def _missing_topics_error(config: KafkaConfig, missing: Sequence[str]) -> SourceError:
    commands = "; ".join(
        f"kafka-topics.sh --create --topic {topic} --partitions {config.partitions} "
        f"--bootstrap-server {config.bootstrap_servers}"
        for topic in missing
    )
    return SourceError(
        f"topic {', '.join(missing)} is not on {config.bootstrap_servers}, or not visible to this client; create "
        f"it ({commands}), or set kafka.create_topics = true"
    )


async def _create_topics(admin: AIOKafkaAdminClient, config: KafkaConfig, names: Sequence[str]) -> None:
    new_topics = [NewTopic(name, config.partitions, config.replication_factor) for name in names]
    response = (await admin.create_topics(new_topics)).to_object()
    for topic in response["topic_errors"]:
        error = errors.for_code(topic["error_code"])
        if error not in (errors.NoError, errors.TopicAlreadyExistsError):
            raise _creation_error(error, f"topic {topic['topic']} cannot be created: {topic.get('error_message')}")
    while not all(map(_has_leaders, await admin.describe_topics(list(names)))):  # noqa: ASYNC110 - Kafka cannot notify
        await asyncio.sleep(METADATA_POLL_S)
    log.info("topics created", topics=list(names), partitions=config.partitions)


def _has_leaders(topic: Mapping[str, Any]) -> bool:
    """Whether every partition has a leader; until then a client finds no topic and logs an error."""
    return not topic["error_code"] and all(partition["leader"] >= 0 for partition in topic["partitions"])


def _creation_error(error: type[errors.KafkaError], text: str) -> Exception:
    """Return a retriable error as itself, for `retry_at_start`, else a SourceError."""
    if error.retriable:
        return error(text)
    cause = cause_of(error())
    step = cause.action if cause is not None else CREATION_STEPS.get(error, "create the topic with kafka-topics.sh")
    return SourceError(f"{text} ({error.__name__}); {step}")


async def ensure_coordinator(config: KafkaConfig, clock: Clock, group: str) -> None:
    """Return when the group's coordinator answers. Raises SourceError, SourceUnavailable.

    It may still be loading, and a cluster's first group waits until the offsets topic is created.
    """

    # NOTE: aiokafka 0.14 treats a coordinator that is loading as one without offsets and members.
    async def check(admin: AIOKafkaAdminClient) -> None:
        while (error := await _coordinator_error(admin, group)) is not None:
            if not is_transient(error):
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
