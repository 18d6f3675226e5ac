import re
from types import SimpleNamespace

import pytest
from aiokafka.errors import GroupLoadInProgressError

from tests.kafka.broker import Owner
from worker.cli import main
from worker.clock import WallClock
from worker.config import KafkaConfig
from worker.errors import ConfigError, SourceError
from worker.kafka import client as connecting
from worker.kafka.client import cli_timeouts, client_options
from worker.kafka.source import KafkaSource
from worker.replay.local_servers import LocalKafka

LOGIN = 'org.apache.kafka.common.security.plain.PlainLoginModule required username="node" password="n" user_node="n"'
WITH_PASSWORDS = {
    "listener.security.protocol.map": "PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN",
    "sasl.mechanism.inter.broker.protocol": "PLAIN",
    "listener.name.plaintext.plain.sasl.jaas.config": f'{LOGIN} user_shop="right";',
}


def test_a_password_opens_the_broker_and_a_wrong_one_is_refused_at_once(run, tmp_path):
    async def joining(config: KafkaConfig) -> None:
        source, owner = KafkaSource(config, WallClock()), Owner()
        await source.start(owner)
        await source.stop()
        assert len(owner.history) == 1

    with LocalKafka(tmp_path, settings=WITH_PASSWORDS) as server:
        right = {
            "bootstrap_servers": server.bootstrap,
            "create_topics": True,
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_username": "shop",
            "sasl_password": "right",
        }
        run(joining(KafkaConfig(**right)))
        with pytest.raises(SourceError, match=r"refuses this client: .*Authentication failed.*kafka.sasl_") as caught:
            run(joining(KafkaConfig(**right | {"sasl_password": "wrong"})), timeout_s=20)
        assert not caught.value.retriable


def test_tls_files_that_are_not_there_are_named(tmp_path):
    config = KafkaConfig(security_protocol="SSL", ssl_cafile=str(tmp_path / "ca.pem"))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "ca.pem"))):
        client_options(config)


@pytest.mark.parametrize("bootstrap", ["broker:one", "good:9092,bad:port"])
def test_an_address_that_is_none_is_a_configuration_error(bootstrap: str):
    with pytest.raises(ConfigError, match=rf"^kafka\.bootstrap_servers '{bootstrap}': want HOST:PORT"):
        client_options(KafkaConfig(bootstrap_servers=bootstrap))


def test_sasl_without_a_user_is_a_configuration_error():
    with pytest.raises(ConfigError, match="set kafka.sasl_username and kafka.sasl_password"):
        client_options(KafkaConfig(security_protocol="SASL_SSL"))


def test_tls_and_sasl_reach_the_client():
    config = KafkaConfig(
        security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", sasl_username="u", sasl_password="p"
    )
    options = client_options(config)
    assert options["ssl_context"].check_hostname
    assert (options["sasl_mechanism"], options["sasl_plain_username"]) == ("SCRAM-SHA-512", "u")
    assert client_options(KafkaConfig())["ssl_context"] is None


@pytest.mark.parametrize("command", ["dlq ls", "dlq requeue", "rebuild"])
def test_without_a_broker_a_command_says_so_soon_and_in_one_sentence(command: str, valkey: str, monkeypatch, capsys):
    monkeypatch.setattr(connecting, "CLI_START_TIMEOUT_S", 1.2)  # a warning, two more attempts, the end
    monkeypatch.setenv("MILLRACE__KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("MILLRACE__REDIS__URL", valkey)
    assert main(command.split()) == 4
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(f"millrace {command.split()[0]}: no answer from Kafka at 127.0.0.1:1")
    assert said.count("Kafka is not ready") == 1
    assert "aiokafka" not in said


def test_a_command_waits_seconds_a_deployment_a_minute_and_a_timeout_that_was_set_is_kept():
    assert cli_timeouts(KafkaConfig()).start_timeout_s == connecting.CLI_START_TIMEOUT_S <= 10
    assert cli_timeouts(KafkaConfig(start_timeout_s=90)).start_timeout_s == 90


def test_a_coordinator_that_is_loading_is_not_taken_for_one_that_knows_nothing(run):
    answer = SimpleNamespace(to_object=lambda: {"groups": [{"error_code": GroupLoadInProgressError.errno}]})

    class Admin:
        async def describe_consumer_groups(self, groups: list[str]) -> list[SimpleNamespace]:
            return [answer]

    error = run(connecting._coordinator_error(Admin(), "group"))
    assert isinstance(error, GroupLoadInProgressError)
    assert error.retriable
