"""Each reason why Kafka cannot be used is one sentence that names it, from the start of a worker or command."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, codec, errors
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from msgspec.structs import replace
from structlog.testing import capture_logs

from tests.kafka.broker import BreakableKafka, Broker, RecordingListener
from tests.kafka.sources import joined, poll_records, values
from tests.tls import self_signed_certificate, tls_server
from worker.cli import main
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import SourceError, SourceUnavailable
from worker.interfaces import Partition
from worker.kafka import client
from worker.kafka.client import client_options, list_partitions
from worker.kafka.diagnosis import diagnose
from worker.kafka.error_causes import cause_of, describe
from worker.kafka.source import KafkaSource
from worker.kafka.static_membership import is_instance_taken
from worker.operations.dead_letter_topic import DeadLetterTopic
from worker.replay.child_process import HOST, free_ports
from worker.replay.local_servers import LocalKafka, missing_requirement

SOON_S = 20.0  # far less than `start_timeout_s`


async def start_error(config: KafkaConfig) -> SourceError:
    """Return the error with which a source does not start."""
    with pytest.raises(SourceError) as caught:
        async with asyncio.timeout(SOON_S):
            await KafkaSource(config, WallClock()).start(RecordingListener())
    return caught.value


@pytest.fixture(scope="module")
def listeners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableKafka]:
    """A broker that listens with and without SASL."""
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    with BreakableKafka(tmp_path_factory.mktemp("listeners")) as server:
        yield server


def sasl(bootstrap: str, **changes: Any) -> KafkaConfig:
    login = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "shop", "sasl_password": "right"}
    return KafkaConfig(bootstrap_servers=bootstrap, **(login | changes))


async def test_group_with_another_assignor_is_refused_at_once(broker: Broker) -> None:
    topic = await broker.topic()
    config = broker.config(events_topic=topic)
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker.bootstrap,
        group_id=config.group_id,
        partition_assignment_strategy=[RangePartitionAssignor],
    ):
        error = await start_error(config)
    assert not error.retriable
    assert "by another strategy or protocol" in str(error)
    assert f"kafka.group_id = '{config.group_id}'" in str(error)
    assert "set another kafka.group_id" in str(error)


async def poll_until_error(source: KafkaSource) -> None:
    async with asyncio.timeout(SOON_S):
        while True:
            await source.poll(0.1)


async def test_second_worker_with_an_instance_id_ends_the_first_with_its_name_and_goes_on(broker: Broker) -> None:
    topic = await broker.topic()
    config = broker.config(events_topic=topic, group_instance_id="pod-0")
    listener = RecordingListener()
    async with joined(config, RecordingListener()) as first, joined(config, listener) as second:
        taken = r"another process .*kafka\.group_instance_id = 'pod-0'.*its own"
        with pytest.raises(SourceError, match=taken) as caught:
            await poll_until_error(first)
        await first.stop()
        await broker.produce(topic, [b"event"])
        assert values(await poll_records(second, 1)) == [b"event"]
        await second.commit({Partition(topic, 0): 1}, listener.assignments)
        assert listener.history == ["assigned"]
    assert await broker.committed(topic, config.group_id) == 1
    assert not caught.value.retriable


async def test_instance_id_is_taken_while_a_member_has_exactly_this_one(broker: Broker) -> None:
    config = broker.config(events_topic=await broker.topic(), group_instance_id="pod-0")
    assert not await is_instance_taken(config)
    async with joined(config, RecordingListener()):
        assert await is_instance_taken(config)
        assert not await is_instance_taken(replace(config, group_instance_id="pod"))


def test_error_of_a_taken_instance_id_is_known_though_the_client_passes_it_on_as_text(broker: Broker) -> None:
    passed_on = errors.KafkaError(repr(errors.for_code(82)()))
    cause = cause_of(errors.KafkaError(f"Unexpected error during coordination {passed_on!r}"))
    assert cause is not None
    text = describe(broker.config(group_instance_id="pod-0"), cause, "")
    assert "another process with the same kafka.group_instance_id (" in text
    assert "kafka.group_instance_id = 'pod-0'" in text
    assert cause.is_permanent


async def test_codec_without_its_library_is_named(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = await broker.topic()
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, compression_type="zstd") as producer:
        await producer.send_and_wait(topic, b"x" * 1000)
    config = broker.config(events_topic=topic, dead_letter_topic=topic)
    monkeypatch.setattr(codec, "cramjam", None)
    async with joined(config, RecordingListener()) as source:
        with pytest.raises(SourceError, match="pip install cramjam"):
            await poll_records(source, 1)
    with pytest.raises(SourceError, match="pip install cramjam"):
        await DeadLetterTopic(config).read(newest=1)


def test_doctor_names_a_missing_codec_before_any_record_does(kafka: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(codec, "cramjam", None)
    monkeypatch.setenv("MILLRACE__KAFKA__BOOTSTRAP_SERVERS", kafka)
    main(["doctor"])
    assert "pip install cramjam" in capsys.readouterr().out


async def test_advertised_address_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    advertised = {"advertised.listeners": "PLAINTEXT://kafka.internal.invalid:9092"}
    with LocalKafka(tmp_path, settings=advertised) as server:
        error = await start_error(KafkaConfig(bootstrap_servers=server.bootstrap, start_timeout_s=2))
        monkeypatch.setenv("MILLRACE__KAFKA__BOOTSTRAP_SERVERS", server.bootstrap)
        await asyncio.to_thread(main, ["doctor"])
        finding = capsys.readouterr().out
    for text in (str(error), finding):
        assert f"Kafka at {server.bootstrap} answers, but a broker that it names does not" in text
        assert "node 1 at kafka.internal.invalid:9092" in text
        assert "advertised.listeners" in text
    assert isinstance(error, SourceUnavailable)


async def test_wrong_password_and_mechanism_are_told_apart_without_the_password(listeners: BreakableKafka) -> None:
    password = await start_error(sasl(listeners.sasl_bootstrap, sasl_password="hunter2"))
    mechanism = await start_error(sasl(listeners.sasl_bootstrap, sasl_mechanism="SCRAM-SHA-256"))
    assert "rejects the credentials" in str(password)
    assert "does not offer this SASL mechanism (kafka.sasl_mechanism = 'SCRAM-SHA-256'" in str(mechanism)
    assert "hunter2" not in str(password)
    assert (password.retriable, mechanism.retriable) == (False, False)


async def test_login_that_is_expected_or_not_expected_is_named(listeners: BreakableKafka) -> None:
    expected = await start_error(KafkaConfig(bootstrap_servers=listeners.sasl_bootstrap, start_timeout_s=2))
    unexpected = await start_error(sasl(listeners.bootstrap))
    assert "set kafka.security_protocol to SASL_PLAINTEXT or SASL_SSL" in str(expected)
    assert "expects no login" in str(unexpected)


async def test_tls_that_is_expected_or_not_expected_is_named(listeners: BreakableKafka, tmp_path: Path) -> None:
    unexpected = await start_error(KafkaConfig(bootstrap_servers=listeners.bootstrap, security_protocol="SSL"))
    assert "speaks no TLS (kafka.security_protocol = 'SSL'" in str(unexpected)
    async with tls_server(self_signed_certificate(tmp_path)) as address:
        expected = await start_error(KafkaConfig(bootstrap_servers=address))
        untrusted = await start_error(KafkaConfig(bootstrap_servers=address, security_protocol="SSL"))
    assert "speaks TLS (kafka.security_protocol = 'PLAINTEXT'" in str(expected)
    assert "certificate that is not trusted" in str(untrusted)
    assert {error.retriable for error in (unexpected, expected, untrusted)} == {False}


async def test_another_service_on_the_port_is_named(valkey: str) -> None:
    address = re.search(r"//(.*)/", valkey)
    assert address is not None
    error = await start_error(KafkaConfig(bootstrap_servers=address[1]))
    assert f"Kafka at {address[1]} does not speak Kafka's protocol" in str(error)
    assert not error.retriable


async def test_one_reachable_bootstrap_server_of_several_is_enough(broker: Broker) -> None:
    (closed,) = free_ports(1)
    options = client_options(KafkaConfig(bootstrap_servers=f"{HOST}:{closed},{broker.bootstrap}"))
    diagnosis = await diagnose(options, OSError("an error of its own"))
    assert diagnosis.cause.says == "answers with an error that passes by itself"
    assert await list_partitions(broker.config(), WallClock(), broker.name("missing")) == []


async def test_silent_listener_does_not_answer() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, HOST, 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        error = await start_error(KafkaConfig(bootstrap_servers=f"{HOST}:{port}", start_timeout_s=1))
    assert isinstance(error, SourceUnavailable)
    assert f"Kafka at {HOST}:{port} does not answer (for 1 s: " in str(error)


async def test_silent_listener_is_reported_while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENT_S", 0.1)
    server = await asyncio.start_server(lambda reader, writer: None, HOST, 0)
    async with server:
        config = KafkaConfig(bootstrap_servers=f"{HOST}:{server.sockets[0].getsockname()[1]}")
        with capture_logs() as logs:
            starting = asyncio.create_task(list_partitions(config, WallClock(), "events"))
            async with asyncio.timeout(SOON_S):
                while not logs:  # noqa: ASYNC110 - a log cannot notify
                    await asyncio.sleep(0.05)
        assert not starting.done()
        starting.cancel()
    assert [entry["event"] for entry in logs] == ["Kafka is not ready"]
    assert f"Kafka at {config.bootstrap_servers} does not answer (" in logs[0]["error"]


async def test_session_timeout_outside_of_the_brokers_limits_names_them(broker: Broker) -> None:
    error = await start_error(broker.config(events_topic=await broker.topic(), session_timeout_ms=1))
    assert "kafka.session_timeout_ms = 1" in str(error)
    assert "within the broker's group.min.session.timeout.ms and group.max.session.timeout.ms" in str(error)


async def test_topic_that_cannot_be_created_names_the_key_to_change(broker: Broker) -> None:
    config = broker.config(events_topic=broker.name("events"), create_topics=True, replication_factor=3)
    error = await start_error(config)
    assert "InvalidReplicationFactorError); set kafka.replication_factor to at most" in str(error)
