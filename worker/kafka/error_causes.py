"""One table from an error of Kafka, or of aiokafka, to what it says, what it means and what to do.

docs/operations.md shows the table. An error that is not in it is reported by its own text.
"""

import re
import ssl
from typing import NamedTuple

from aiokafka import errors

from worker.config import KafkaConfig


class FencedInstanceIdError(errors.BrokerResponseError):
    errno = 82
    message = "FENCED_INSTANCE_ID"


class GroupMaxSizeReachedError(errors.BrokerResponseError):
    errno = 81
    message = "GROUP_MAX_SIZE_REACHED"


# NOTE: aiokafka 0.14 does not know these codes and would report `UnknownError`, without the number. `kafka_errors` is
# the table that its `for_code` reads; it has no function that adds to it.
for _class in (FencedInstanceIdError, GroupMaxSizeReachedError):
    errors.kafka_errors.setdefault(_class.errno, _class)


class Cause(NamedTuple):
    """Why Kafka cannot be used.

    says: completes a sentence that begins with "Kafka at HOST:PORT"
    errors: the classes that have this cause; none: `diagnose` finds it by trying
    keys: of the section kafka, whose values the message shows; never a secret
    is_permanent: a retry cannot succeed
    """

    says: str
    means: str
    action: str
    errors: tuple[type[Exception], ...] = ()
    keys: tuple[str, ...] = ()
    is_permanent: bool = True


CODEC_MISSING = Cause(
    "has a batch in a codec that this installation cannot read",
    "the Python package `cramjam`, which decodes snappy, lz4 and zstd, is missing",
    "run `pip install cramjam`, then start again",
    (errors.UnsupportedCodecError,),
)
OTHER_PROTOCOL = Cause(
    "does not let this worker join the group: its members assign partitions by another strategy or protocol",
    "another application has the same group id",
    "set another kafka.group_id, or stop the other application",
    (errors.InconsistentGroupProtocolError,),
    ("group_id",),
)
FENCED_INSTANCE = Cause(
    "gave this worker's place in the group to another process with the same kafka.group_instance_id",
    "two workers have one instance id: a Deployment's replicas with one environment, or a pod that is slow to end",
    "give each worker its own kafka.group_instance_id, such as its pod's ordinal, or leave it unset",
    (FencedInstanceIdError,),
    ("group_id", "group_instance_id"),
)
GROUP_FULL = Cause(
    "lets no more members into the group",
    "the group has as many members as the broker's group.max.size",
    "stop a worker, or raise group.max.size",
    (GroupMaxSizeReachedError,),
    ("group_id",),
)
SESSION_TIMEOUT = Cause(
    "does not accept kafka.session_timeout_ms",
    "the value is outside of the broker's limits, which are 6 s and 30 min unless set",
    "set kafka.session_timeout_ms within the broker's group.min.session.timeout.ms and group.max.session.timeout.ms",
    (errors.InvalidSessionTimeoutError,),
    ("session_timeout_ms",),
)
CREDENTIALS = Cause(
    "rejects the credentials",
    "the user is unknown, or the password is wrong, for this listener and mechanism",
    "set kafka.sasl_username, kafka.sasl_password and kafka.sasl_mechanism",
    (errors.SaslAuthenticationFailed, errors.AuthenticationFailedError),
    ("sasl_username", "sasl_mechanism"),
)
MECHANISM = Cause(
    "does not offer this SASL mechanism",
    "the listener has other mechanisms enabled; the message lists them",
    "set kafka.sasl_mechanism",
    (errors.UnsupportedSaslMechanismError, errors.AuthenticationMethodNotSupported),
    ("sasl_mechanism",),
)
SASL_UNEXPECTED = Cause(
    "expects no login",
    "kafka.security_protocol has SASL, the listener has none",
    "set kafka.security_protocol to PLAINTEXT or SSL, or name the listener with SASL",
    (errors.IllegalSaslStateError,),
    ("security_protocol",),
)
SASL_EXPECTED = Cause(
    "closes the connection at the first request",
    "the listener expects a login (SASL), or the broker is stopping",
    "set kafka.security_protocol to SASL_PLAINTEXT or SASL_SSL, with kafka.sasl_username and kafka.sasl_password",
    keys=("security_protocol",),
    is_permanent=False,
)
TLS_EXPECTED = Cause(
    "speaks TLS",
    "kafka.security_protocol is without TLS, the listener has it",
    "set kafka.security_protocol to SSL or SASL_SSL",
    keys=("security_protocol",),
)
TLS_UNEXPECTED = Cause(
    "speaks no TLS",
    "kafka.security_protocol has TLS, the listener is without it",
    "set kafka.security_protocol to PLAINTEXT or SASL_PLAINTEXT, or name the listener with TLS",
    keys=("security_protocol",),
)
CERTIFICATE = Cause(
    "has a certificate that is not trusted",
    "it is signed by an unknown authority, expired, or for another host name",
    "set kafka.ssl_cafile to its authority, and kafka.bootstrap_servers to a name that it is for",
    (ssl.SSLCertVerificationError,),
    ("ssl_cafile",),
)
NOT_KAFKA = Cause(
    "does not speak Kafka's protocol",
    "another service listens on this port",
    "set kafka.bootstrap_servers",
)
ADVERTISED = Cause(
    "answers, but a broker that it names does not",
    "clients are sent to the addresses in the brokers' advertised.listeners; this one cannot be reached from here",
    "set the broker's advertised.listeners to an address that this machine reaches",
    is_permanent=False,
)
TOPIC_FORBIDDEN = Cause(
    "forbids this client the topic",
    "no ACL allows it: READ on the events, items and dead-letter topics, WRITE on the others, DESCRIBE on all",
    "add the ACL with kafka-acls.sh",
    (errors.TopicAuthorizationFailedError,),
    ("sasl_username",),
)
GROUP_FORBIDDEN = Cause(
    "forbids this client the group",
    "no ACL allows READ and DESCRIBE on the group",
    "add the ACL with kafka-acls.sh, or set kafka.group_id",
    (errors.GroupAuthorizationFailedError,),
    ("group_id", "sasl_username"),
)
CLUSTER_FORBIDDEN = Cause(
    "forbids this client the operation on the cluster",
    "no ACL allows IDEMPOTENT_WRITE, or CREATE where kafka.create_topics is on",
    "add the ACL with kafka-acls.sh",
    (errors.ClusterAuthorizationFailedError,),
    ("sasl_username",),
)
TRANSACTION_FORBIDDEN = Cause(
    "forbids this client transactions",
    "no ACL allows WRITE and DESCRIBE on the transactional id, which `millrace dlq requeue` uses",
    "add the ACL with kafka-acls.sh; the id is kafka.group_id followed by .requeue",
    (errors.TransactionalIdAuthorizationFailed,),
    ("group_id", "sasl_username"),
)
NO_ANSWER = Cause(
    "does not answer",
    "it is down or starting, or a firewall or a wrong address is in between",
    "start it, or set kafka.bootstrap_servers, kafka.security_protocol or kafka.start_timeout_s",
    is_permanent=False,
)
NOT_READY = Cause(
    "answers with an error that passes by itself",
    "a leader is being elected, a topic or the group's coordinator is not yet there",
    "wait, or read the broker's log; kafka.start_timeout_s says how long to wait",
    is_permanent=False,
)
CAUSES = (
    NO_ANSWER,
    NOT_READY,
    NOT_KAFKA,
    ADVERTISED,
    TLS_EXPECTED,
    TLS_UNEXPECTED,
    CERTIFICATE,
    CREDENTIALS,
    MECHANISM,
    SASL_EXPECTED,
    SASL_UNEXPECTED,
    TOPIC_FORBIDDEN,
    GROUP_FORBIDDEN,
    CLUSTER_FORBIDDEN,
    TRANSACTION_FORBIDDEN,
    OTHER_PROTOCOL,
    FENCED_INSTANCE,
    GROUP_FULL,
    SESSION_TIMEOUT,
    CODEC_MISSING,
)
_BY_NAME = {each.__name__: cause for cause in CAUSES for each in cause.errors}


def cause_of(error: BaseException) -> Cause | None:
    """Return the cause that an error's class, or the class that its text names, stands for; None when unknown.

    aiokafka wraps some errors of the group as text: KafkaError("FencedInstanceIdError()").
    """
    for cause in CAUSES:
        if isinstance(error, cause.errors):
            return cause
    if not isinstance(error, errors.KafkaError):
        return None
    return next((_BY_NAME[name] for name in re.findall(r"\b(\w+)\(", str(error)) if name in _BY_NAME), None)


def is_permanent(error: BaseException) -> bool:
    """Whether a retry cannot succeed, because Kafka refuses this client or its configuration."""
    cause = cause_of(error)
    return cause is not None and cause.is_permanent


def describe(config: KafkaConfig, cause: Cause, detail: str) -> str:
    """Return one sentence: where, what, the values concerned, the error's own text, and the next step."""
    values = [f"kafka.{key} = {getattr(config, key)!r}" for key in cause.keys if getattr(config, key) is not None]
    details = "; ".join(part for part in (*values, detail) if part)
    return f"Kafka at {config.bootstrap_servers} {cause.says} ({details}); {cause.action}"


def error_text(error: BaseException) -> str:
    """Return the error's own text; its class's name where it has none, or only a number."""
    text = str(error)
    name = type(error).__name__
    return text if re.sub(r"\[Error -?\d+\]", "", text).strip() else f"{text}{name}".strip()


def explain(config: KafkaConfig, error: BaseException, topic: str) -> str:
    """Return one sentence about an error that a retry does not fix."""
    cause = cause_of(error)
    if cause is not None:
        return describe(config, cause, error_text(error))
    where = f"Kafka at {config.bootstrap_servers}, topic {topic}, group {config.group_id}"
    return f"{where}: {error!r}; see the broker's log and kafka.* in the configuration"
