"""Find out why no connection to Kafka comes about: aiokafka only logs the reason, or sees a closed connection."""

import asyncio
import struct
from typing import Any, NamedTuple

from aiokafka import errors
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import collect_hosts, create_conn

from worker.kafka.error_causes import (
    ADVERTISED,
    NO_ANSWER,
    NOT_KAFKA,
    NOT_READY,
    SASL_EXPECTED,
    TLS_EXPECTED,
    TLS_UNEXPECTED,
    Cause,
    cause_of,
    error_text,
)
from worker.system.listener import accepts_tls, first_bytes

TIMEOUT_S = 6.0  # for all attempts together
CONNECT_S = 2.5  # for one connection, with its login
# ApiVersions, version 0, correlation id 1, no client id: any listener of Kafka answers it before a login.
API_VERSIONS = struct.pack(">ihhih", 10, 18, 0, 1, -1)
TEXT = b"PING\r\n\r\n"  # Redis and HTTP servers answer text only
TLS_ALERT = b"\x15\x03"
CONNECTION_ERRORS = (errors.KafkaError, OSError, TimeoutError)


class Diagnosis(NamedTuple):
    cause: Cause
    detail: str


async def diagnose(options: dict[str, Any], error: Exception) -> Diagnosis:
    """Return an error's cause: by its class, or by connecting once more. options: those of aiokafka's clients"""
    if cause := cause_of(error):
        return Diagnosis(cause, error_text(error))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await _by_connecting(options) or Diagnosis(NOT_READY, error_text(error))
    except TimeoutError:
        return Diagnosis(NO_ANSWER, error_text(error))


async def _by_connecting(options: dict[str, Any]) -> Diagnosis | None:
    """Try the bootstrap servers, then each broker that it names; None when all of them answer."""
    hosts = [(host, port) for host, port, _ in collect_hosts(options["bootstrap_servers"])]
    attempts = await asyncio.gather(*(_connection_error(options, *address) for address in hosts))
    failures = [error for error in attempts if error is not None]
    if len(failures) == len(hosts):
        cause = cause_of(failures[0]) or await _probe(*hosts[0], options["security_protocol"])
        return Diagnosis(cause or NO_ANSWER, error_text(failures[0]))
    client = AIOKafkaClient(**options)
    try:
        await client.bootstrap()
        for broker in client.cluster.brokers():
            if error := await _connection_error(options, broker.host, broker.port):
                node = f"node {broker.nodeId} at {broker.host}:{broker.port}"
                return Diagnosis(cause_of(error) or ADVERTISED, f"{node}: {error_text(error)}")
    except CONNECTION_ERRORS as error:
        return Diagnosis(SASL_EXPECTED, error_text(error))
    finally:
        await client.close()
    return None


async def _connection_error(options: dict[str, Any], host: str, port: int) -> Exception | None:
    """Return why connecting and logging in fails, None when it succeeds."""
    others = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    try:
        async with asyncio.timeout(CONNECT_S):
            (await create_conn(host, port, **others)).close()
    except CONNECTION_ERRORS as error:
        return error
    return None


async def _probe(host: str, port: int, security_protocol: str) -> Cause | None:
    """Return what is wrong with the listener itself, None when it is silent or as configured."""
    wants_tls = "SSL" in security_protocol.split("_")
    try:
        answer = await first_bytes(host, port, API_VERSIONS) or b""
        if answer.startswith(TLS_ALERT) or (not answer and await accepts_tls(host, port)):
            return None if wants_tls else TLS_EXPECTED
        if answer and _is_kafka(answer):
            return TLS_UNEXPECTED if wants_tls else None
        return NOT_KAFKA if answer or await first_bytes(host, port, TEXT) else None
    except OSError:
        return None


def _is_kafka(answer: bytes) -> bool:
    """Whether the answer begins with a size below 64 KiB, as that of API_VERSIONS does, and its correlation id."""
    return answer[:2] == b"\0\0" and answer[4:] in (b"", b"\0\0\0\1")
