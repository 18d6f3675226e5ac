"""What every Kafka client of ours shares: how it connects, what must be there at start, which errors end a process."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.helpers import create_ssl_context

from worker import logging
from worker.config import Kafka
from worker.errors import ConfigError, SourceError, SourceUnavailable
from worker.seams import Clock

log = logging.get("kafka")
T = TypeVar("T")
RETRY_S = 0.5  # between attempts at start: a broker that comes up is noticed at once, one that is away is not hammered
CAUSE_S = 5.0  # to ask once more why a connection fails
MISSING_S = 2.0  # a topic that was just created is not at once known to every broker
REFUSED = (
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


def client_options(config: Kafka) -> dict[str, Any]:
    """Keyword arguments of every aiokafka client. ConfigError when a TLS file or the SASL user is not usable."""
    if config.security_protocol.startswith("SASL") and None in (config.sasl_username, config.sasl_password):
        raise ConfigError(f"kafka.security_protocol {config.security_protocol} wants sasl_username and sasl_password")
    return {
        "bootstrap_servers": config.bootstrap,
        "request_timeout_ms": config.request_timeout_ms,
        "security_protocol": config.security_protocol,
        "sasl_mechanism": config.sasl_mechanism,
        "sasl_plain_username": config.sasl_username,
        "sasl_plain_password": config.sasl_password,
        "ssl_context": _ssl_context(config),
    }


def _ssl_context(config: Kafka) -> ssl.SSLContext | None:
    if "SSL" not in config.security_protocol.split("_"):
        return None
    try:
        return create_ssl_context(cafile=config.ssl_cafile, certfile=config.ssl_certfile, keyfile=config.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        files = f"ssl_cafile={config.ssl_cafile}, ssl_certfile={config.ssl_certfile}, ssl_keyfile={config.ssl_keyfile}"
        raise ConfigError(f"kafka: TLS cannot be set up from {files}: {error}") from error


def refused(error: BaseException) -> bool:
    """Would repeating not help, because somebody said no?"""
    return isinstance(error, REFUSED)


async def at_start(config: Kafka, clock: Clock, act: Callable[[], Awaitable[T]]) -> T:
    """`act()`, repeated until it succeeds. SourceUnavailable after `start_timeout_s`, SourceError when refused."""
    deadline_s = clock.monotonic() + config.start_timeout_s
    while True:
        try:
            async with asyncio.timeout(max(0.0, deadline_s - clock.monotonic())):
                return await act()
        except (errors.KafkaError, OSError, TimeoutError) as raised:
            error = await _cause(config, raised)
            if refused(error):
                raise SourceError(
                    f"kafka {config.bootstrap} refuses this client: {_said(error)}; see kafka.sasl_* and kafka.ssl_*"
                ) from error
            if clock.monotonic() + RETRY_S >= deadline_s:
                raise SourceUnavailable(
                    f"no answer from Kafka at {config.bootstrap} within {config.start_timeout_s:g} s ({_said(error)}); "
                    f"start the broker, or set kafka.bootstrap, kafka.security_protocol or kafka.start_timeout_s"
                ) from error
            log.warning("Kafka is not ready", bootstrap=config.bootstrap, error=_said(error))
        await asyncio.sleep(RETRY_S)


async def _cause(config: Kafka, error: Exception) -> Exception:
    """Why no connection can be had: aiokafka only logs it."""
    if not isinstance(error, errors.KafkaConnectionError):
        return error
    options = client_options(config)
    host, port, _ = collect_hosts(options.pop("bootstrap_servers"))[0]
    try:
        async with asyncio.timeout(CAUSE_S):
            (await create_conn(host, port, **options)).close()
    except (errors.KafkaError, OSError, TimeoutError) as cause:
        return cause
    return error


async def ensure_topics(config: Kafka, clock: Clock, topics: Sequence[str]) -> None:
    """Returns when all of the topics are there, made by us when `create_topics` is on; else SourceError names what is
    missing. Asks for the list of all topics, for a broker may create one that is asked for by name."""
    wait_until_s: float | None = None

    async def check() -> None:
        nonlocal wait_until_s
        admin = AIOKafkaAdminClient(**client_options(config))
        try:
            await admin.start()
            if missing := set(topics) - set(await admin.list_topics()):
                wait_until_s = wait_until_s or clock.monotonic() + MISSING_S
                if not config.create_topics and clock.monotonic() < wait_until_s:
                    raise errors.UnknownTopicOrPartitionError(", ".join(sorted(missing)))
                await _create(admin, config, sorted(missing))
        finally:
            await admin.close()

    await at_start(config, clock, check)


async def _create(admin: AIOKafkaAdminClient, config: Kafka, missing: Sequence[str]) -> None:
    if not config.create_topics:
        commands = "; ".join(
            f"kafka-topics.sh --create --topic {topic} --partitions {config.partitions} "
            f"--bootstrap-server {config.bootstrap}"
            for topic in missing
        )
        raise SourceError(
            f"topic {', '.join(missing)} is not on {config.bootstrap}, or not visible to this client; create it "
            f"({commands}), or set kafka.create_topics = true"
        )
    wanted = [NewTopic(topic, config.partitions, config.replication) for topic in missing]
    response = (await admin.create_topics(wanted)).to_object()
    for topic in response["topic_errors"]:
        error = errors.for_code(topic["error_code"])
        if error not in (errors.NoError, errors.TopicAlreadyExistsError):
            raise _creation_error(error, f"topic {topic['topic']} cannot be created: {topic.get('error_message')}")
    log.info("topics created", topics=list(missing), partitions=config.partitions)


def _creation_error(error: type[errors.KafkaError], text: str) -> Exception:
    """A retriable one is left to `at_start`."""
    return error(text) if error.retriable else SourceError(f"{text} ({error.__name__}); see kafka.replication")


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
