"""The configuration tree: every mistake is named with its path, every value with its source."""

import json
import re
from itertools import combinations

import pytest

from worker import config_file
from worker.config import TOPIC_KEYS
from worker.errors import ConfigError
from worker.kafka.client import client_options


def shown_rows(path=None, env=None) -> dict[str, tuple[str, str]]:
    """Return value and source by key."""
    env = env or {}
    return {key: (value, source) for key, value, source in config_file.show(config_file.load(path, env), path, env)}


def test_environment_overrides_the_file_and_the_file_the_default(tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('[redis]\nurl = "redis://file"\ntimeout_s = 1.5\n')
    shown = shown_rows(file, {"MILLRACE__REDIS__URL": "redis://env"})
    assert shown["redis.url"] == ("redis://env", "MILLRACE__REDIS__URL")
    assert shown["redis.timeout_s"] == ("1.5", str(file))
    assert shown["redis.cluster"] == ("false", "default")
    assert shown["batcher.length_buckets"] == ("[32, 64, 128, 256, 512, 1024]", "default")
    assert shown["pipeline.artifact"] == ("", "default")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[redis]\nurll = 'x'\n", "urll"),
        ("[rediss]\nurl = 'x'\n", "rediss"),
        ("[batcher]\nmax_users = 0\n", "$.batcher.max_users"),
        ("[batcher]\nmax_users = 'many'\n", "$.batcher.max_users"),
        (
            "[events]\ntrigger_actions = ['cart', 'dance']\n",
            "events.trigger_actions: dance not in events.actions (view, ",
        ),
        ("[labels]\npaid_actions = ['buy']\n", "labels.paid_actions: buy not in events.actions (view, "),
        ("[labels]\nengaged_dwell_ms = -1\n", "$.labels.engaged_dwell_ms"),
        ("[labels]\nengaged_value = inf\n", "$.labels.engaged_value"),
        ("[labels]\nretention_days = 1e12\n", "$.labels.retention_days"),
        (
            "[events.action_aliases]\naddtocart = 'basket'\n",
            "events.action_aliases: basket not in events.actions (view, ",
        ),
        ("[events]\naction_aliases = ['a']\n", "$.events.action_aliases"),
        ("[pipeline]\nstrategy = 'oracle'\n", "strategy 'oracle' is unknown; want one of unified, "),
        ("[kafka]\nsasl_mechanism = 'SCRAM'\n", "$.kafka.sasl_mechanism"),
        ("[kafka\n", "not TOML"),
    ],
)
def test_mistake_in_the_file_is_one_sentence_with_its_path(tmp_path, text: str, expected: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"\S") as caught:
        config_file.load(file, {})
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_trigger_action_may_be_added_by_the_environment(tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[events]\ntrigger_actions = ['dance']\n")
    loaded = config_file.load(file, {"MILLRACE__EVENTS__ACTIONS": "['view', 'dance']"})
    assert loaded.events.trigger_actions == ("dance",)


def test_default_labels_fit_a_schema_without_their_actions() -> None:
    loaded = config_file.load(None, {"MILLRACE__EVENTS__ACTIONS": "['view']", "MILLRACE__LABELS__RETENTION_DAYS": "1"})
    assert loaded.labels.retention_days == 1


@pytest.mark.parametrize("text", ['{addtocart = "cart"}', '{"addtocart": "cart"}'])
def test_table_in_the_environment_is_read_as_toml_or_json(text: str, tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('[events.action_aliases]\naddtocart = "cart"\n')
    from_environment = config_file.load(None, {"MILLRACE__EVENTS__ACTION_ALIASES": text})
    assert from_environment == config_file.load(file, {})
    assert from_environment.events.action_aliases == {"addtocart": "cart"}
    shown = shown_rows(env={"MILLRACE__EVENTS__ACTION_ALIASES": text})["events.action_aliases"]
    assert shown == ('{"addtocart": "cart"}', "MILLRACE__EVENTS__ACTION_ALIASES")
    with pytest.raises(ConfigError, match=r"events\.action_aliases: basket not in events\.actions"):
        config_file.load(None, {"MILLRACE__EVENTS__ACTION_ALIASES": text.replace('"cart"', '"basket"')})


def test_unknown_variable_and_missing_file_are_rejected() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        config_file.load(None, {"MILLRACE__NOSUCH__KEY": "1"})
    with pytest.raises(ConfigError, match="MILLRACE__SECTION__KEY"):
        config_file.load(None, {"MILLRACE__REDIS": "1"})
    with pytest.raises(ConfigError, match="No such file"):
        config_file.load("nowhere.toml", {})


def test_environment_values_are_parsed_as_toml() -> None:
    env = {
        "MILLRACE__BATCHER__COALESCE": "false",
        "MILLRACE__EVENTS__ACTIONS": '["a", "b"]',
        "MILLRACE__KAFKA__BOOTSTRAP_SERVERS": "one:1,two:2",
    }
    loaded = config_file.load(None, env)
    assert loaded.batcher.coalesce is False
    assert loaded.events.actions == ("a", "b")
    assert loaded.kafka.bootstrap_servers == "one:1,two:2"


def test_text_from_the_environment_stays_text_whatever_it_looks_like() -> None:
    env = {
        "MILLRACE__SEQUENCES__TOPIC_GENERATION": "2",
        "MILLRACE__KAFKA__GROUP_INSTANCE_ID": "0",
        "MILLRACE__KAFKA__SASL_PASSWORD": "0123456789",
        "MILLRACE__KAFKA__GROUP_ID": "true",
    }
    loaded = config_file.load(None, env)
    assert loaded.sequences.topic_generation == "2"
    assert loaded.kafka.group_instance_id == "0"
    assert loaded.kafka.group_id == "true"
    assert loaded.kafka.sasl_password == "0123456789"
    assert shown_rows(env=env)["kafka.sasl_password"][0] == "***"


def test_invalid_value_in_the_environment_names_its_variable() -> None:
    env = {"MILLRACE__BATCHER__MAX_USERS": "many", "MILLRACE__REDIS__URL": "redis://a"}
    with pytest.raises(ConfigError, match=r"MILLRACE__BATCHER__MAX_USERS: .*\$\.batcher\.max_users"):
        config_file.load(None, env)


def test_secrets_are_masked_when_shown() -> None:
    env = {"MILLRACE__KAFKA__SASL_PASSWORD": "hunter2", "MILLRACE__REDIS__URL": "rediss://me:hunter2@cache:6380/1"}
    shown = shown_rows(env=env)
    assert shown["kafka.sasl_password"][0] == "***"
    assert shown["redis.url"][0] == "rediss://***@cache:6380/1"
    assert "hunter2" not in str(shown)


@pytest.mark.parametrize(
    ("name", "value"),
    [("BATCHER__LENGTH_BUCKETS", "[]"), ("SEQUENCES__TTL_DAYS", "0.00001"), ("SLATES__TTL_DAYS", "0.00001")],
)
def test_value_that_would_fail_at_the_first_event_is_refused_at_load(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"MILLRACE__{name}"):
        config_file.load(None, {f"MILLRACE__{name}": value})


@pytest.mark.parametrize("key", ["actions", "devices"])
def test_names_that_do_not_fit_into_a_rings_byte_or_repeat_are_refused(key: str) -> None:
    names = [f"name-{number}" for number in range(256)]
    variable = f"MILLRACE__EVENTS__{key.upper()}"
    assert len(getattr(config_file.load(env={variable: json.dumps(names[:255])}).events, key)) == 255
    with pytest.raises(ConfigError, match=rf"{variable}.*length <= 255"):
        config_file.load(env={variable: json.dumps(names)})
    with pytest.raises(ConfigError, match=rf"{variable}.*{key} has view more than once"):
        config_file.load(env={variable: '["view", "cart", "view"]'})


def test_start_that_is_no_time_is_refused() -> None:
    assert (
        config_file.load(env={"MILLRACE__KAFKA__START_AT": "2026-01-31T12:00Z"}).kafka.start_at == "2026-01-31T12:00Z"
    )
    with pytest.raises(ConfigError, match=r"MILLRACE__KAFKA__START_AT: start_at 'yesterday': want an ISO 8601 time"):
        config_file.load(env={"MILLRACE__KAFKA__START_AT": "yesterday"})


@pytest.mark.parametrize(
    "servers",
    ["", "broker", "broker:one", "broker:0", "broker:99999", "kafka://broker", "a:1,", "a:1,b", "::1:9092", "[x]:1"],
)
def test_address_without_a_host_and_a_port_that_exists_is_refused(servers: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"BOOTSTRAP_SERVERS: bootstrap_servers '{re.escape(servers)}': want HOST:PORT"
    ):
        config_file.load(env={"MILLRACE__KAFKA__BOOTSTRAP_SERVERS": servers})


@pytest.mark.parametrize("servers", ["broker-1:1, broker_2.shop:65535", "[::1]:9092,127.0.0.1:9092"])
def test_addresses_of_names_and_of_both_internet_protocols_are_accepted(servers: str) -> None:
    loaded = config_file.load(env={"MILLRACE__KAFKA__BOOTSTRAP_SERVERS": servers})
    assert client_options(loaded.kafka)["bootstrap_servers"] == servers


def test_empty_group_id_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MILLRACE__KAFKA__GROUP_ID: group_id is empty"):
        config_file.load(env={"MILLRACE__KAFKA__GROUP_ID": ""})


@pytest.mark.parametrize("key", [*TOPIC_KEYS, "group_instance_id"])
@pytest.mark.parametrize("name", ["", ".", "..", "bad topic/\u00e9", "x" * 250, "new\n"])
def test_name_that_kafka_does_not_allow_is_refused(key: str, name: str) -> None:
    variable = f"MILLRACE__KAFKA__{key.upper()}"
    with pytest.raises(ConfigError, match=f"{variable}: {key} .*: want 1 to 249 of a-z, A-Z, 0-9"):
        config_file.load(env={variable: name})
    longest = "..a_Z-0" + "x" * 242
    assert getattr(config_file.load(env={variable: longest}).kafka, key) == longest


@pytest.mark.parametrize(("one", "other"), list(combinations(TOPIC_KEYS, 2)))
def test_two_topics_of_one_name_are_refused(one: str, other: str, tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text(f"[kafka]\n{one} = 'same'\n{other} = 'same'\n")
    with pytest.raises(ConfigError, match=f"{file}: kafka.{one} and kafka.{other} are both 'same'; name two topics"):
        config_file.load(file, {})
    assert config_file.load(file, {f"MILLRACE__KAFKA__{one.upper()}": "another"}).kafka.items_topic


def test_topics_may_exchange_their_names_in_the_environment() -> None:
    env = {"MILLRACE__KAFKA__EVENTS_TOPIC": "items", "MILLRACE__KAFKA__ITEMS_TOPIC": "events"}
    assert config_file.load(env=env).kafka.events_topic == "items"
