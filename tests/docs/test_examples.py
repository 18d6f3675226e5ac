"""The examples of docs/examples, run as a reader runs them."""

import os
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from pipeline.records import Event
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions
from tests.conftest import Shop
from tests.kafka.broker import Broker
from tests.kafka.slates import make_slate
from worker import config_file
from worker.replay.local_servers import LocalKafka

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
KAFKA_EXAMPLES = ["produce_events.py", "consume_slates.py"]


def run_example(name: str, *arguments: str) -> list[str]:
    """Return the lines that the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLES.parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_run_here() -> None:
    files = {"produce_events.py", "consume_slates.py", "recommend.py", "own_strategy.py", "millrace.toml"}
    assert {path.name for path in EXAMPLES.iterdir()} == files


def test_library_example_recommends_with_and_without_a_history(shop: Shop) -> None:
    with_history, without_history = run_example("recommend.py", str(shop.artifact))
    assert with_history.startswith("hstu [('item-")
    assert without_history.count("item-") == 5


def test_own_strategy_ranks_what_is_popular_and_new_to_the_user(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    pipeline = Pipeline.load(shop.artifact, PipelineOptions(device="cpu", strategies=("own_strategy:Trending",)))
    ((popular, *others),) = [[item.item_id for item in slate.items] for slate in pipeline.recommend([[]], k=5)]
    (slate,) = pipeline.recommend([[Event("user-1", popular, "view", 1_700_000_000_000)]], k=5)
    assert slate.strategy == "trending"
    assert [item.item_id for item in slate.items][:4] == others


@pytest.fixture
def deployment(run, kafka: str, valkey: str, topics) -> dict[str, str]:
    """Return the settings of a worker whose topics are there."""
    broker = Broker(kafka, topics)
    events, slates, dead = [run(broker.topic(kind=kind)) for kind in ("events", "slates", "dead")]
    return {
        "KAFKA__BOOTSTRAP_SERVERS": kafka,
        "KAFKA__GROUP_ID": topics("group"),
        "KAFKA__EVENTS_TOPIC": events,
        "KAFKA__RECOMMENDATIONS_TOPIC": slates,
        "KAFKA__DEAD_LETTER_TOPIC": dead,
        "REDIS__URL": valkey,
        "BATCHER__COALESCE": "false",
        "HEALTH__PORT": "0",
    }


def test_produced_events_come_back_as_slates(deployment: dict[str, str]) -> None:
    environment = os.environ | {f"MILLRACE__{key}": value for key, value in deployment.items()}
    kafka = deployment["KAFKA__BOOTSTRAP_SERVERS"]
    worker = subprocess.Popen([sys.executable, "-m", "worker.cli", "run"], env=environment)
    try:
        produced = run_example("produce_events.py", kafka, deployment["KAFKA__EVENTS_TOPIC"])
        slates = deployment["KAFKA__RECOMMENDATIONS_TOPIC"]
        consumed = run_example("consume_slates.py", kafka, slates, str(len(produced)))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()
    assert [line.split()[0] for line in produced] == ["view", "click", "cart", "purchase"]
    assert [line.split(":")[0] for line in consumed] == ["user-1 by simple on numpy (best)"] * 4


def test_configuration_example_is_valid_and_sets_what_it_says() -> None:
    path = EXAMPLES / "millrace.toml"
    loaded = config_file.load(path, env={})
    tree = tomllib.loads(path.read_text())
    assert loaded.kafka.bootstrap_servers == "broker-1:9092,broker-2:9092"
    for section, values in tree.items():
        for key, value in values.items():
            got = getattr(getattr(loaded, section), key)
            assert (list(got) if isinstance(got, tuple) else got) == value


@pytest.mark.parametrize("name", KAFKA_EXAMPLES)
def test_example_without_a_broker_ends_with_one_sentence(name: str) -> None:
    example = start_example(name, "127.0.0.1:1")
    assert error_of(example).endswith(" at 127.0.0.1:1: KafkaConnectionError; is the broker running?")


def test_examples_end_with_one_sentence_if_the_broker_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for example in [start_example(name, address) for name in KAFKA_EXAMPLES]:
            assert f" at {address}: " in error_of(example)


def test_consumer_ends_with_one_sentence_when_the_broker_is_lost(run, tmp_path: Path, kafka: str) -> None:
    with LocalKafka(tmp_path) as own:
        broker = Broker(own.bootstrap, lambda kind: kind)
        topic = run(broker.topic(kind="slates"))
        run(broker.produce(topic, [msgspec.json.encode(make_slate("user-1"))]))
        example = start_example("consume_slates.py", own.bootstrap, topic)
        assert example.stdout is not None
        assert example.stdout.readline().startswith("user-1 by ")
    assert error_of(example) == f"cannot read slates at {own.bootstrap}: KafkaTimeoutError; is the broker running?"


def start_example(name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(EXAMPLES / name), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def error_of(example: subprocess.Popen[str]) -> str:
    """Wait until the example fails, and return its only line on stderr."""
    [error] = example.communicate(timeout=60)[1].splitlines()
    assert example.returncode == 1
    return error
