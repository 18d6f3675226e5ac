"""Connections to Kafka: credentials, TLS, invalid configuration, and brokers that are down, hang or restart."""

import asyncio
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka.errors import GroupLoadInProgressError

from pipeline.slates import Slate
from tests.kafka.broker import BreakableKafka, Broker, RecordingListener
from tests.kafka.slates import MemoryStore, make_slate, sink_config
from tests.kafka.sources import joined, poll_records, values
from worker.cli import main
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import ConfigError, SinkUnavailable, SourceError
from worker.interfaces import Partition
from worker.kafka import client
from worker.kafka.client import cli_timeouts, client_options
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.replay.local_servers import missing_requirement


@pytest.fixture(scope="module")
def second_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BreakableKafka]:
    """Stopped at the module's end: an idle broker takes CPU time from the rest of the session."""
    if reason := missing_requirement():
        pytest.skip(f"no Kafka broker can be started here: {reason}")
    with BreakableKafka(tmp_path_factory.mktemp("breakable-kafka")) as server:
        yield server


@pytest.fixture
def breakable_kafka(second_kafka: BreakableKafka) -> Iterator[BreakableKafka]:
    """A broker apart from the session's, running at the start of each test."""
    yield second_kafka
    second_kafka.restore()


@pytest.fixture
def breakable_broker(breakable_kafka: BreakableKafka, topics: Callable[[str], str]) -> Broker:
    return Broker(breakable_kafka.bootstrap, topics)


@pytest.fixture
def sasl_config(breakable_kafka: BreakableKafka) -> dict[str, Any]:
    return {
        "bootstrap_servers": breakable_kafka.sasl_bootstrap,
        "create_topics": True,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_username": "shop",
        "sasl_password": "right",
    }


async def test_right_password_joins_the_group(sasl_config: dict, listener: RecordingListener):
    source = KafkaSource(KafkaConfig(**sasl_config), WallClock())
    await source.start(listener)
    await source.stop()
    assert len(listener.history) == 1


async def test_wrong_password_is_a_permanent_error_at_once(sasl_config: dict, listener: RecordingListener):
    source = KafkaSource(KafkaConfig(**sasl_config | {"sasl_password": "wrong"}), WallClock())
    with pytest.raises(
        SourceError, match=r"rejects the credentials .*'shop'.*Authentication failed.*set kafka.sasl_"
    ) as caught:
        async with asyncio.timeout(20):
            await source.start(listener)
    assert not caught.value.retriable


def test_missing_tls_file_is_named(tmp_path):
    config = KafkaConfig(security_protocol="SSL", ssl_cafile=str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "ca.pem"))):
        client_options(config)


def test_sasl_without_a_user_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"set kafka.sasl_username and kafka.sasl_password"):
        client_options(KafkaConfig(security_protocol="SASL_SSL"))


def test_kerberos_without_its_library_is_a_configuration_error(monkeypatch, capsys):
    monkeypatch.setattr(client, "find_spec", lambda name: None)
    monkeypatch.setenv("MILLRACE__KAFKA__SECURITY_PROTOCOL", "SASL_PLAINTEXT")
    monkeypatch.setenv("MILLRACE__KAFKA__SASL_MECHANISM", "GSSAPI")
    assert main(["dlq", "ls"]) == 2
    assert "run `pip install gssapi`" in capsys.readouterr().err


def test_tls_and_sasl_options_reach_the_client():
    config = KafkaConfig(
        security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", sasl_username="u", sasl_password="p"
    )
    options = client_options(config)
    assert options["ssl_context"].check_hostname
    assert (options["sasl_mechanism"], options["sasl_plain_username"]) == ("SCRAM-SHA-512", "u")
    assert client_options(KafkaConfig())["ssl_context"] is None


@pytest.mark.parametrize("command", ["dlq ls", "dlq requeue", "rebuild"])
def test_command_without_a_broker_fails_soon_with_one_sentence(command: str, valkey: str, monkeypatch, capsys):
    monkeypatch.setattr(client, "CLI_START_TIMEOUT_S", 1.2)  # a warning, two more attempts, the end
    monkeypatch.setenv("MILLRACE__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("MILLRACE__REDIS__URL", valkey)
    assert main(command.split()) == 4
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith(
        f"millrace {command.split()[0]}: Kafka at 127.0.0.1:1 does not answer (for 1.2 s: "
    )
    assert stderr.count("Kafka is not ready") == 1
    assert "aiokafka" not in stderr


def test_cli_timeout_is_short_unless_a_timeout_was_set():
    assert cli_timeouts(KafkaConfig()).start_timeout_s == client.CLI_START_TIMEOUT_S <= 10
    assert cli_timeouts(KafkaConfig(start_timeout_s=90)).start_timeout_s == 90


async def test_loading_coordinator_is_a_retriable_error():
    answer = SimpleNamespace(to_object=lambda: {"groups": [{"error_code": GroupLoadInProgressError.errno}]})

    class Admin:
        async def describe_consumer_groups(self, groups: list[str]) -> list[SimpleNamespace]:
            return [answer]

    error = await client._coordinator_error(cast(Any, Admin()), "group")
    assert isinstance(error, GroupLoadInProgressError)
    assert error.retriable


async def send_until_acknowledged(sink: KafkaSink, slates: list[Slate]) -> None:
    while True:
        try:
            return await sink.send(slates)
        except SinkUnavailable:
            await asyncio.sleep(0.1)


async def test_hung_broker_is_reported_and_then_gets_every_slate_once(
    breakable_kafka: BreakableKafka, breakable_broker: Broker
):
    config = await sink_config(breakable_broker, request_timeout_ms=1500)
    slates = [make_slate(f"user-{number}") for number in range(50)]
    async with KafkaSink(config, MemoryStore()) as sink:
        await send_until_acknowledged(sink, [make_slate("first")])
        breakable_kafka.suspend()
        with pytest.raises(SinkUnavailable, match="acknowledged nothing"):
            await sink.send(slates)
        breakable_kafka.resume()
        await send_until_acknowledged(sink, slates)
        await send_until_acknowledged(sink, [make_slate("last")])
    assert len(await breakable_broker.read(config.kafka.recommendations_topic, 52)) == 52


async def test_restart_of_a_killed_broker_loses_neither_slates_nor_commits(
    breakable_kafka: BreakableKafka, breakable_broker: Broker, listener: RecordingListener
):
    topic = await breakable_broker.topic()
    source_config = breakable_broker.config(events_topic=topic, session_timeout_ms=30000)
    config = await sink_config(breakable_broker, request_timeout_ms=1500)
    slates = [make_slate(f"user-{number}") for number in range(50)]
    await breakable_broker.produce(topic, [b"event"] * 10)
    async with joined(source_config, listener) as source, KafkaSink(config, MemoryStore()) as sink:
        await send_until_acknowledged(sink, [make_slate("first")])
        assert values(await poll_records(source, 10)) == [b"event"] * 10
        await asyncio.to_thread(breakable_kafka.kill)
        committing = asyncio.create_task(source.commit({Partition(topic, 0): 10}, listener.assignments))
        assert await source.poll(0.2) == []
        with pytest.raises(SinkUnavailable):
            await sink.send(slates[:20])
        await asyncio.to_thread(breakable_kafka.start)
        await committing
        assert await breakable_broker.committed(topic, source_config.group_id) == 10
        await breakable_broker.produce(topic, [b"after"])
        assert values(await poll_records(source, 1)) == [b"after"]
        await send_until_acknowledged(sink, slates[20:])
        await send_until_acknowledged(sink, [make_slate("last")])
    records = await breakable_broker.read(config.kafka.recommendations_topic, 52)
    assert len(records) == 52  # the 20 given up were delivered, too
